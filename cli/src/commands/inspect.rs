//! `nibble inspect`: what a model holds.

use std::path::PathBuf;

use clap::Args;
use nibble_model::hub::ModelReference;
use nibble_model::inspection::{Inspection, Weight, inspect};

use crate::hub::model_directory;
use crate::output::print_json;

/// Arguments of `nibble inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble inspect ./qwen2.5-coder-0.5b-instruct.gguf")]
pub(crate) struct InspectArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &InspectArguments) -> anyhow::Result<()> {
    let path: PathBuf = match ModelReference::parse(&arguments.model)? {
        ModelReference::Gguf(file) => file,
        ModelReference::Directory(_) | ModelReference::HubId(_) => model_directory(&arguments.model)?,
    };
    let inspection = inspect(&path)?;
    if arguments.json {
        return print_json(&inspection);
    }
    print_summary(&inspection);
    println!();
    print_table(&inspection);
    Ok(())
}

fn print_summary(inspection: &Inspection) {
    let line = |name: &str, value: String| println!("{name:<16}{value}");
    line("model", inspection.path.display().to_string());
    line("format", inspection.format.to_owned());
    line("architecture", inspection.architecture.clone());
    if let Some(shape) = &inspection.shape {
        line(
            "layers",
            format!(
                "{} of hidden {}, feed-forward {}, {} heads of {}, {} KV heads",
                shape.layers,
                shape.hidden_size,
                shape.intermediate_size,
                shape.heads,
                shape.head_dim,
                shape.kv_heads
            ),
        );
        let tied = if shape.tie_word_embeddings { ", output head tied to it" } else { "" };
        line("vocabulary", format!("{}{tied}", shape.vocabulary_size));
        let rope = format!("rope theta {}, scaling {}", shape.rope_theta, shape.rope_scaling);
        line("context", format!("{} tokens, {rope}", shape.max_position_embeddings));
    }
    line("parameters", inspection.parameters.to_string());
    let bits = inspection.bits_per_weight;
    line("weights", format!("{:.1} MB, {bits:.2} bits per weight", inspection.bytes as f64 / 1e6));
    if let Some(quantization) = &inspection.quantization {
        line("quantization", quantization.to_string());
    }
    let there = |there: bool| if there { "yes" } else { "no" }.to_owned();
    line("tokenizer", there(inspection.tokenizer));
    line("chat template", there(inspection.chat_template));
}

/// The weights outside of the layers, then those of each run of layers that are alike.
fn print_table(inspection: &Inspection) {
    let name_width = inspection.weights.iter().map(|weight| weight.short_name().len()).max().unwrap_or(0);
    let row = |weight: &Weight| {
        let group = weight.group_size.map_or_else(String::new, |size| size.to_string());
        println!(
            "  {:<name_width$}  {:<7}  {:>16}  {:>12}  {:>6.2}  {:>5}",
            weight.short_name(),
            weight.dtype,
            format!("{:?}", weight.shape),
            weight.bytes,
            weight.bits_per_weight,
            group
        );
    };
    println!(
        "  {:<name_width$}  {:<7}  {:>16}  {:>12}  {:>6}  {:>5}",
        "weight", "type", "shape", "bytes", "bits", "group"
    );
    inspection.weights_of(None).for_each(row);
    for run in &inspection.layers {
        let layers = match run.last - run.first {
            0 => format!("layer {}", run.first),
            others => format!("layers {} to {}, each of {}", run.first, run.last, others + 1),
        };
        let megabytes = run.bytes as f64 / 1e6;
        let (parameters, bits) = (run.parameters, run.bits_per_weight);
        println!("{layers}: {parameters} parameters, {megabytes:.1} MB, {bits:.2} bits per weight");
        inspection.weights_of(Some(run.first)).for_each(row);
    }
}
