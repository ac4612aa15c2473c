//! 1_Pooling/config.json of sentence-transformers: how the makers of a model want the hidden states of a text pooled.

use std::path::Path;

use crate::config::Fields;
use crate::error::CheckpointError;

/// How the hidden states of a text become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token, which has seen all others.
    Last,
    /// Their mean, added up in the order of the tokens, in double precision.
    Mean,
}

/// Modes that the file may switch on, and the pooling that each is.
const MODES: [(&str, Option<Pooling>); 6] = [
    ("pooling_mode_lasttoken", Some(Pooling::Last)),
    ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
    ("pooling_mode_cls_token", None),
    ("pooling_mode_max_tokens", None),
    ("pooling_mode_mean_sqrt_len_tokens", None),
    ("pooling_mode_weightedmean_tokens", None),
];

impl Pooling {
    /// What the model in `directory` wants; absent when it does not say.
    ///
    /// # Errors
    /// When the file is malformed, or wants what is not built.
    pub fn of_checkpoint(directory: &Path) -> Result<Option<Self>, CheckpointError> {
        let Some(fields) = Fields::read_if_present(&directory.join("1_Pooling").join("config.json"))? else {
            return Ok(None);
        };
        let mut found = None;
        for (name, pooling) in MODES {
            if fields.optional(name, "true or false")?.unwrap_or(false) {
                if found.is_some() || pooling.is_none() {
                    let expected = "pooling_mode_lasttoken or pooling_mode_mean_tokens alone to be true";
                    return Err(fields.mismatch(name, true, expected));
                }
                found = pooling;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Option<Pooling>, CheckpointError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("1_Pooling")).unwrap();
        std::fs::write(directory.path().join("1_Pooling/config.json"), json).unwrap();
        Pooling::of_checkpoint(directory.path())
    }

    #[test]
    fn one_of_two_poolings_is_taken_and_others_are_refused_by_name() {
        assert_eq!(Pooling::of_checkpoint(Path::new("/nowhere")).unwrap(), None);
        assert_eq!(of(r#"{"word_embedding_dimension": 8}"#).unwrap(), None);
        let mean = r#"{"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": false}"#;
        assert_eq!(of(mean).unwrap(), Some(Pooling::Mean));
        assert_eq!(of(r#"{"pooling_mode_lasttoken": true}"#).unwrap(), Some(Pooling::Last));
        for (json, name) in [
            (r#"{"pooling_mode_cls_token": true}"#, "pooling_mode_cls_token"),
            (
                r#"{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": true}"#,
                "pooling_mode_mean_tokens",
            ),
            (r#"{"pooling_mode_lasttoken": 1}"#, "pooling_mode_lasttoken"),
        ] {
            let error = of(json).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("1_Pooling"), "{error}");
        }
    }
}
