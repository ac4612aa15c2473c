//! generation_config.json: how the makers of a model want its tokens picked, where a request says nothing.

use std::path::Path;

use crate::config::Fields;
use crate::error::CheckpointError;

/// Defaults of sampling parameters; what is absent has no effect. As vLLM does, they count whatever
/// `do_sample` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Divides the logits, at least 0.
    pub temperature: Option<f32>,
    /// Sum of probabilities to sample from, in (0, 1].
    pub top_p: Option<f32>,
    /// Number of most likely tokens to sample from; 0 in the file stands for all and is absent here.
    pub top_k: Option<usize>,
    /// Least probability in proportion to the most likely token's, in [0, 1].
    pub min_p: Option<f32>,
    /// Penalty of tokens that occur already, above 0.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads generation_config.json of `directory`; without the file there are no defaults.
    ///
    /// # Errors
    /// When the file is malformed or a value is outside its range.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let Some(fields) = Fields::read_if_present(&directory.join("generation_config.json"))? else {
            return Ok(Self::default());
        };
        let number = |name: &str, inside: fn(f32) -> bool, expected: &str| {
            let number: Option<f32> = fields.optional(name, expected)?;
            match number {
                Some(number) if !(number.is_finite() && inside(number)) => {
                    Err(fields.mismatch(name, number, expected))
                }
                number => Ok(number),
            }
        };
        Ok(Self {
            temperature: number("temperature", |value| value >= 0.0, "a number of at least 0")?,
            top_p: number("top_p", |value| value > 0.0 && value <= 1.0, "a number above 0 and at most 1")?,
            top_k: fields.optional("top_k", "an integer of at least 0")?.filter(|&top_k| top_k > 0),
            min_p: number("min_p", |value| (0.0..=1.0).contains(&value), "a number from 0 to 1")?,
            repetition_penalty: number("repetition_penalty", |value| value > 0.0, "a number above 0")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(json: &str) -> Result<GenerationConfig, CheckpointError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("generation_config.json"), json).unwrap();
        GenerationConfig::open(directory.path())
    }

    #[test]
    fn what_the_file_gives_is_read_and_the_rest_is_absent() {
        let json = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": 2}"#;
        let expected = GenerationConfig {
            temperature: Some(0.7),
            top_p: Some(0.8),
            top_k: Some(20),
            ..GenerationConfig::default()
        };
        assert_eq!(open(json).unwrap(), expected);
        assert_eq!(open(r#"{"top_k": 0, "min_p": null}"#).unwrap(), GenerationConfig::default());
        assert_eq!(GenerationConfig::open(Path::new("/nowhere")).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn a_value_outside_its_range_is_refused_by_name() {
        for (json, name) in [
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"top_k": -1}"#, "top_k"),
            (r#"{"min_p": 1.5}"#, "min_p"),
            (r#"{"repetition_penalty": "high"}"#, "repetition_penalty"),
        ] {
            let error = open(json).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("generation_config.json"), "{error}");
        }
    }
}
