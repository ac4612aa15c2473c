//! Calibration files: texts whole, JSON and Parquet as documents with the place where each stands.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::path::Path;

use nibble_model::error::CheckpointError;
use serde_json::Value as Json;

use super::document::{Document, HELP};
use super::parquet_rows;
use super::skipped::Skipped;
use crate::error::QuantizeError;

/// What a calibration file holds.
pub(super) enum Contents {
    /// One running text.
    Text(String),
    /// Documents that can be used, at least one.
    Documents(Vec<(Place, Document)>),
}

/// Where a document stands in its file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A line of a JSONL file.
    Line(usize),
    /// An element of a JSON array.
    Element(usize),
    /// A row of a Parquet file.
    Row(usize),
}

impl Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(number) => write!(formatter, "line {number}"),
            Self::Element(number) => write!(formatter, "element {number}"),
            Self::Row(number) => write!(formatter, "row {number}"),
        }
    }
}

/// A document as its file has it.
pub(super) type Located = (Place, Json);

/// Reads `file` as its ending says. Documents that cannot be used go to `skipped`.
///
/// # Errors
/// When the file cannot be read or is not what its ending says, and when none of its documents can be used.
pub(super) fn read(
    file: &Path,
    field: Option<&str>,
    skipped: &mut Skipped,
) -> Result<Contents, QuantizeError> {
    let ending = file.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
    let values = match ending.as_deref() {
        Some("json" | "jsonl") => json_values(file, &read_utf8(file)?)?,
        Some("parquet") => parquet_rows::read(file, field)?,
        _ => return read_utf8(file).map(Contents::Text),
    };
    if values.is_empty() {
        return Err(refusal(file, "it has no documents", "give a file with some"));
    }
    let mut documents = Vec::with_capacity(values.len());
    let mut of_file = Skipped::default();
    for (place, value) in values {
        match Document::parse(value, field) {
            Ok(document) => documents.push((place, document)),
            Err(reason) => of_file.add(file, Some(place), reason),
        }
    }
    if documents.is_empty() {
        return Err(QuantizeError::NoSamples { skipped: of_file.to_string(), help: HELP });
    }
    skipped.append(of_file);
    Ok(Contents::Documents(documents))
}

/// The error that `file` cannot be used.
pub(super) fn refusal(file: &Path, problem: impl Into<String>, help: &str) -> QuantizeError {
    QuantizeError::Calibration { file: file.to_owned(), problem: problem.into(), help: help.to_owned() }
}

fn read_utf8(file: &Path) -> Result<String, QuantizeError> {
    let bytes = std::fs::read(file).map_err(CheckpointError::io("read", file))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        refusal(file, format!("byte {at} is not UTF-8 (line {line})"), "convert it to a UTF-8 text")
    })
}

/// The values of a JSON array, or of lines with one each; blank lines hold none.
fn json_values(file: &Path, text: &str) -> Result<Vec<Located>, QuantizeError> {
    const EXPECTED: &str = "give one JSON value in each line, or one array of them";
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('[') {
        let values: Vec<Json> = serde_json::from_str(text)
            .map_err(|error| refusal(file, format!("it is not a valid JSON array: {error}"), EXPECTED))?;
        return Ok((1..).map(Place::Element).zip(values).collect());
    }
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| match serde_json::from_str(line) {
            Ok(value) => Ok((Place::Line(number), value)),
            Err(error) => {
                // The error counts lines from the beginning of this one.
                let message = error.to_string();
                let message = message.rsplit_once(" at line ").map_or(&*message, |(message, _)| message);
                let place = format!("line {number}, column {}", error.column());
                Err(refusal(file, format!("{place} is not valid JSON: {message}"), EXPECTED))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(name: &str, contents: &[u8]) -> (Result<Contents, QuantizeError>, Skipped) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(name);
        std::fs::write(&file, contents).unwrap();
        let mut skipped = Skipped::default();
        (read(&file, None, &mut skipped), skipped)
    }

    fn documents(name: &str, contents: &str) -> Vec<(Place, Document)> {
        match written(name, contents.as_bytes()).0.unwrap() {
            Contents::Documents(documents) => documents,
            Contents::Text(text) => panic!("{text} is no document"),
        }
    }

    #[test]
    fn lines_and_arrays_give_documents_with_their_places() {
        let text = |text: &str| Document::Text(text.to_owned());
        let lines = documents("a.JSONL", "\u{feff}\"a\"\r\n\r\n{\"text\": \"b\"}");
        assert_eq!(lines, [(Place::Line(1), text("a")), (Place::Line(3), text("b"))]);
        assert_eq!(documents("a.json", "\"a\"\n\"b\"\n")[1], (Place::Line(2), text("b")));
        let array = documents("a.json", " [\n \"a\",\n {\"text\": \"b\"}]\n");
        assert_eq!(array, [(Place::Element(1), text("a")), (Place::Element(2), text("b"))]);
    }

    #[test]
    fn documents_that_cannot_be_used_are_skipped_by_name() {
        let (contents, skipped) = written("a.jsonl", b"{\"text\": \"\"}\n\"a\"\n3\n");
        assert!(matches!(contents, Ok(Contents::Documents(documents)) if documents.len() == 1));
        let said = skipped.to_string();
        assert!(
            said.contains("a.jsonl line 1: empty") && said.contains("a.jsonl line 3: a number"),
            "{said}"
        );
    }

    #[test]
    fn a_file_that_is_not_what_its_ending_says_is_refused_with_its_line() {
        let many = json!({"body": "a"}).to_string() + "\n";
        for (name, contents, problem) in [
            ("a.jsonl", &b""[..], "no documents"),
            ("a.json", b"[]", "no documents"),
            ("a.jsonl", b"\"a\"\n\"b\xff\"\n", "byte 6 is not UTF-8 (line 2)"),
            ("a.jsonl", b"\"a\"\n{\"text\": \"b\n", "line 2, column 11 is not valid JSON: EOF"),
            ("a.json", b"[\"a\",\n\"b\"", "not a valid JSON array: EOF while parsing a list at line 2"),
            ("a.json", b"{\n\"text\": \"a\"\n}", "line 1, column 1 is not valid JSON"),
            ("a.jsonl", many.repeat(9).as_bytes(), "line 1: none of the known fields, it has \"body\""),
            ("a.jsonl", many.repeat(9).as_bytes(), "and 4 more"),
        ] {
            let error = written(name, contents).0.err().expect("a refusal").to_string();
            assert!(error.contains(problem) && error.contains(name), "{error}");
        }
    }
}
