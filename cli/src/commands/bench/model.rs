//! The model that `nibble bench` measures: a checkpoint, or random weights in the shape of one.

use clap::{Args, ValueEnum};
use nibble_kernels::Backend;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::config::ModelConfig;
use nibble_model::forward::Model;

use crate::device::{ModelArguments, load, open_checkpoint};
use crate::hub::model_directory;

/// Which model, and where it runs.
#[derive(Debug, Args)]
pub(super) struct BenchModelArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// Where weights come from: dummy makes random ones in the shape that config.json says, and reads nothing else.
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    load_format: LoadFormat,
    #[command(flatten)]
    pub(super) run: ModelArguments,
}

/// The choices of `--load-format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LoadFormat {
    Auto,
    Dummy,
}

/// A model that can be loaded.
pub(super) enum BenchModel {
    Checkpoint(Box<Checkpoint>),
    Dummy(Box<ModelConfig>),
}

impl BenchModelArguments {
    /// Opens what is needed of it.
    pub(super) fn open(&self) -> anyhow::Result<BenchModel> {
        Ok(match self.load_format {
            LoadFormat::Auto => BenchModel::Checkpoint(Box::new(open_checkpoint(&self.model)?)),
            LoadFormat::Dummy => {
                let config = model_directory(&self.model)?.join("config.json");
                BenchModel::Dummy(Box::new(ModelConfig::from_file(&config)?))
            }
        })
    }
}

impl BenchModel {
    /// Its shape.
    pub(super) fn config(&self) -> &ModelConfig {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Dummy(config) => config,
        }
    }

    /// Loads it for sequences of up to `max_positions` tokens.
    pub(super) fn load<B: Backend>(&self, backend: B, max_positions: usize) -> anyhow::Result<Model<B>> {
        match self {
            Self::Checkpoint(checkpoint) => load(checkpoint, backend, max_positions),
            Self::Dummy(config) => Ok(Model::random(backend, config, max_positions)?),
        }
    }
}
