//! What the report says of how this command was called.

use std::path::Path;

use nibble_model::hub::ModelReference;
use nibble_quantizer::report::{CalibrationDescription, RunReport};
use nibble_quantizer::{Calibration, Report, Settings};
use serde::Deserialize;

use super::arguments::QuantizeArguments;

/// The report of a run that has not been evaluated; `source` is the directory of the original.
pub(super) fn start_report(
    arguments: &QuantizeArguments,
    source: &Path,
    settings: Settings,
    calibration: Option<&Calibration>,
    report: Report,
) -> RunReport {
    let describe = |calibration: &Calibration| CalibrationDescription {
        sources: arguments.calibration.calibration.iter().map(|path| path.display().to_string()).collect(),
        samples: calibration.sequences().len(),
        sequence_length: calibration.sequence_length(),
        tokens: calibration.sequences().iter().map(Vec::len).sum(),
        seed: arguments.calibration.seed,
    };
    RunReport {
        nibble_version: env!("CARGO_PKG_VERSION"),
        model: arguments.model.clone(),
        base_model: base_model(&arguments.model, source),
        command: command_line(std::env::args_os().map(|argument| argument.to_string_lossy().into_owned())),
        settings,
        calibration: calibration.map(describe),
        seconds: 0.0,
        peak_memory_bytes: None,
        quality: None,
        quality_gate: None,
        report,
    }
}

/// The Hugging Face id of `model`: as it was named, or as the config.json of its directory says.
fn base_model(model: &str, source: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        #[serde(rename = "_name_or_path")]
        name: String,
    }
    let hub_id = |name: &str| match ModelReference::parse(name) {
        Ok(ModelReference::HubId(id)) => Some(id),
        _ => None,
    };
    hub_id(model).or_else(|| {
        let config = std::fs::read(source.join("config.json")).ok()?;
        hub_id(&serde_json::from_slice::<Named>(&config).ok()?.name)
    })
}

/// The command line as a shell reads it; the program without its directory.
fn command_line(arguments: impl Iterator<Item = String>) -> String {
    let plain = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_./=:,%+@".contains(c))
    };
    let quote = |(index, text): (usize, String)| match text {
        _ if index == 0 => "nibble".to_owned(),
        text if plain(&text) => text,
        text => format!("'{}'", text.replace('\'', r"'\''")),
    };
    arguments.enumerate().map(quote).collect::<Vec<_>>().join(" ")
}

/// The largest resident set of this process so far, where the system tells.
pub(super) fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_given_to_a_shell_again() {
        let line = command_line(
            ["/bin/nibble", "quantize", "my model", "it's", "", "5%"].map(String::from).into_iter(),
        );
        assert_eq!(line, r"nibble quantize 'my model' 'it'\''s' '' 5%");
    }
}
