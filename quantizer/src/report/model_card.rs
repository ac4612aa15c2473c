//! README.md of a quantized checkpoint: the model card, with the front matter that the Hugging Face hub reads.

use std::path::Path;

use minijinja::{Environment, context};
use nibble_model::checkpoint::replace_file;
use nibble_model::error::CheckpointError;
use nibble_model::formats::Format;

use super::run::{RunReport, report_error};
use super::table::{fields, percent, quality};
use crate::error::QuantizeError;
use crate::quality_gate::GateStatus;

const TEMPLATE: &str = include_str!("README.md.jinja");
const FILE: &str = "README.md";
/// By this line a card of ours is known, which may be written again.
const MARK: &str = "<!-- written by nibble quantize -->";
/// Fields of the original's front matter that hold for the quantized model too.
const INHERITED: [&str; 3] = ["license", "license_name", "license_link"];

/// Writes the card of `run` into `out`, unless a README.md lies there that is not ours.
pub(super) fn write(run: &RunReport, source: &Path, out: &Path) -> Result<(), QuantizeError> {
    if read_if_present(&out.join(FILE))?.is_some_and(|text| !text.contains(MARK)) {
        tracing::warn!(directory = %out.display(), "the README.md there is not Nibble's; it is left as it is");
        return Ok(());
    }
    let inherited = read_if_present(&source.join(FILE))?.map_or_else(Vec::new, |text| inherited(&text));
    replace_file(out, FILE, render(run, &inherited)?.as_bytes())?;
    Ok(())
}

fn read_if_present(path: &Path) -> Result<Option<String>, CheckpointError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CheckpointError::io("read", path)(error)),
    }
}

/// The [`INHERITED`] fields of a card's front matter, name and value, quotes removed.
fn inherited(card: &str) -> Vec<(String, String)> {
    let mut lines = card.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Vec::new();
    }
    let fields = lines.take_while(|line| line.trim_end() != "---").filter_map(|line| line.split_once(':'));
    fields
        .map(|(name, value)| (name, value.trim().trim_matches(['"', '\''])))
        .filter(|(name, value)| INHERITED.contains(name) && !value.is_empty())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn render(run: &RunReport, inherited: &[(String, String)]) -> Result<String, QuantizeError> {
    let report = &run.report;
    let method = run.settings.method.name();
    let format = match run.settings.format {
        Format::Gptq(_) => "gptq",
        Format::Awq => "awq",
        Format::CompressedTensors => "compressed-tensors",
    };
    let mut tags = vec![format!("{}-bit", run.settings.bits), format.to_owned(), "nibble".to_owned()];
    if !tags.iter().any(|tag| tag == method) {
        tags.push(method.to_owned());
    }
    let quality = run.quality.as_ref().map(quality);
    let gate = run.quality_gate.map(|outcome| {
        let (status, text) = match outcome.status {
            GateStatus::Passed => ("passed", "Perplexity rose by no more than was accepted.".to_owned()),
            GateStatus::Failed => ("failed", outcome.warning().unwrap_or_default()),
            GateStatus::Pending => ("pending", outcome.warning().unwrap_or_default()),
        };
        context! { status => status, text => text, limit => percent(outcome.max_perplexity_increase) }
    });
    let card = context! {
        mark => MARK,
        // A name must not end the line of the heading.
        title => run.title().replace(['\n', '\r'], " "),
        base_model => run.base_model,
        inherited => inherited,
        tags => tags,
        command => run.command,
        settings => fields(&run.settings).map_err(report_error)?,
        calibration => fields(&run.calibration).map_err(report_error)?,
        bits_per_weight => format!("{:.3}", report.bits_per_weight),
        mean_error => percent(report.mean_relative_error()),
        measure => if report.errors_are_of_outputs { "output error" } else { "weight error" },
        quality => quality,
        gate => gate,
        nibble_version => run.nibble_version,
    };
    let mut environment = Environment::new();
    environment.set_keep_trailing_newline(true);
    environment.render_named_str(FILE, TEMPLATE, card).map_err(report_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::run_report;

    #[test]
    fn the_license_of_the_original_and_nothing_else_is_inherited() {
        let card = "---\nlicense: other\nlicense_name: \"llama3\"\nlicense_link: LICENSE\ntags:\n- license: no\n\
                    model-index: x\n---\nlicense: mit\n";
        let found = inherited(card);
        let expected = [("license", "other"), ("license_name", "llama3"), ("license_link", "LICENSE")];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(inherited("# no front matter\nlicense: mit\n").is_empty());
    }

    #[test]
    fn a_card_has_front_matter_command_settings_and_quality() {
        let directory = tempfile::tempdir().unwrap();
        let (source, out) = (directory.path().join("source"), directory.path().join("out"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&out).unwrap();
        std::fs::write(source.join(FILE), "---\nlicense: apache-2.0\n---\n").unwrap();
        write(&run_report(), &source, &out).unwrap();
        let card = std::fs::read_to_string(out.join(FILE)).unwrap();
        let front = card.strip_prefix("---\n").unwrap().split("\n---\n").next().unwrap();
        for line in ["base_model: \"org/model\"", "license: \"apache-2.0\"", "- \"gptq\"", "- \"4-bit\""] {
            assert!(front.contains(line), "no {line} in {front}");
        }
        for part in
            ["nibble quantize 'a model' out", "| group size | 128 |", "20.0000", "quality_gate: failed"]
        {
            assert!(card.contains(part), "no {part} in {card}");
        }
        assert!(!card.contains("&#"), "a card is not escaped as HTML is: {card}");
    }

    #[test]
    fn a_card_of_ours_is_written_again_and_one_of_others_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (out, mut run) = (directory.path(), run_report());
        write(&run, out, out).unwrap();
        run.command = "another command".to_owned();
        write(&run, out, out).unwrap();
        assert!(std::fs::read_to_string(out.join(FILE)).unwrap().contains("another command"));
        std::fs::write(out.join(FILE), "precious").unwrap();
        write(&run, out, out).unwrap();
        assert_eq!(std::fs::read_to_string(out.join(FILE)).unwrap(), "precious");
    }
}
