//! `nibble inspect`: what a model holds.

use std::fmt::Write;
use std::path::Path;

use clap::Args;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::inspection::{Inspection, Weight, inspect};
use nibble_model::self_test::SelfTest;
use nibble_quantizer::quality_gate::recorded_outcome;
use serde::Serialize;
use serde_json::json;

use crate::device::DeviceArguments;
use crate::hub::model_path;
use crate::output::{print_json, print_text};

/// Arguments of `nibble inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble inspect ./qwen2.5-coder-0.5b-instruct.gguf")]
pub(crate) struct InspectArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// Check the weights and some logits against the nibble_self_test.json that `nibble quantize` wrote.
    #[arg(long)]
    verify: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

/// Runs the command.
pub(crate) fn run(arguments: &InspectArguments) -> anyhow::Result<()> {
    let path = model_path(&arguments.model)?;
    let inspection = inspect(&path)?;
    let verification = match arguments.verify {
        true => Some(verify(&path, arguments)?),
        false => None,
    };
    let quality_gate = recorded_outcome(&path).unwrap_or_else(|error| {
        eprintln!("warning: {error}");
        None
    });
    if arguments.json {
        let mut document = serde_json::to_value(&inspection)?;
        if let Some(outcome) = &quality_gate {
            document["quality_gate"] = json!(outcome);
        }
        if let Some(verification) = &verification {
            document["verification"] = json!(verification);
        }
        return print_json(&document);
    }
    let mut text = String::new();
    for (name, value) in summary(&inspection) {
        writeln!(text, "{name:<16}{value}")?;
    }
    if let Some(outcome) = quality_gate {
        let passed = || "passed".to_owned();
        writeln!(text, "{:<16}{}", "quality gate", outcome.warning().unwrap_or_else(passed))?;
    }
    if let Some(Verification { weights, largest_logit_difference, tolerance }) = verification {
        let name = "self-test";
        writeln!(
            text,
            "{name:<16}passed: {weights} weights, logits within {largest_logit_difference} of {tolerance}"
        )?;
    }
    for line in table(&inspection) {
        write!(text, "\n{line}")?;
    }
    print_text(&(text + "\n"))
}

/// What a self-test that passed has checked.
#[derive(Serialize)]
struct Verification {
    weights: usize,
    largest_logit_difference: f32,
    tolerance: f32,
}

fn verify(path: &Path, arguments: &InspectArguments) -> anyhow::Result<Verification> {
    let test = SelfTest::open(path)?;
    let checkpoint = Checkpoint::open(path)?;
    test.check_weights(&checkpoint)?;
    Ok(Verification {
        weights: test.weights.len(),
        largest_logit_difference: test.check_streamed(arguments.device.cpu(), &checkpoint)?,
        tolerance: test.tolerance,
    })
}

/// Names and values of what is true of the whole model.
fn summary(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let there = |there: bool| if there { "yes" } else { "no" }.to_owned();
    let mut lines = vec![
        ("model", inspection.path.display().to_string()),
        ("format", inspection.format.to_owned()),
        ("architecture", inspection.architecture.clone()),
    ];
    if let Some(shape) = &inspection.shape {
        let heads = format!("{} heads of {}, {} KV heads", shape.heads, shape.head_dim, shape.kv_heads);
        let widths = format!("hidden {}, feed-forward {}", shape.hidden_size, shape.intermediate_size);
        let tied = if shape.tie_word_embeddings { ", output head tied to it" } else { "" };
        let rope = format!("rope theta {}, scaling {}", shape.rope_theta, shape.rope_scaling);
        lines.extend([
            ("layers", format!("{} of {widths}, {heads}", shape.layers)),
            ("vocabulary", format!("{}{tied}", shape.vocabulary_size)),
            ("context", format!("{} tokens, {rope}", shape.max_position_embeddings)),
        ]);
    }
    let (megabytes, bits) = (inspection.bytes as f64 / 1e6, inspection.bits_per_weight);
    lines.extend([
        ("parameters", inspection.parameters.to_string()),
        ("weights", format!("{megabytes:.1} MB, {bits:.2} bits per weight")),
    ]);
    lines.extend(inspection.quantization.as_ref().map(|settings| ("quantization", settings.to_string())));
    lines.extend([
        ("tokenizer", there(inspection.tokenizer)),
        ("chat template", there(inspection.chat_template)),
    ]);
    lines
}

/// The weights outside of the layers, then those of each kind of layer.
fn table(inspection: &Inspection) -> Vec<String> {
    let width = inspection.weights.iter().map(|weight| weight.short_name().len()).max().unwrap_or(0);
    let row = |weight: &Weight| {
        let group = weight.group_size.map_or_else(String::new, |size| size.to_string());
        let shape = format!("{:?}", weight.shape);
        let (name, dtype, bytes, bits) =
            (weight.short_name(), &weight.dtype, weight.bytes, weight.bits_per_weight);
        format!("  {name:<width$}  {dtype:<7}  {shape:>16}  {bytes:>12}  {bits:>6.2}  {group:>5}")
    };
    let (name, dtype, shape, bytes, bits, group) = ("weight", "type", "shape", "bytes", "bits", "group");
    let mut lines =
        vec![format!("  {name:<width$}  {dtype:<7}  {shape:>16}  {bytes:>12}  {bits:>6}  {group:>5}")];
    lines.extend(inspection.weights_of(None).map(row));
    for kind in &inspection.layers {
        let noun = if kind.layers.len() == 1 { "layer" } else { "layers" };
        let each = if kind.layers.len() == 1 { "" } else { "each " };
        let (parameters, megabytes, bits) = (kind.parameters, kind.bytes as f64 / 1e6, kind.bits_per_weight);
        lines.push(format!(
            "{noun} {}: {each}{parameters} parameters, {megabytes:.1} MB, {bits:.2} bits per weight",
            ranges(&kind.layers)
        ));
        lines.extend(inspection.weights_of(kind.layers.first().copied()).map(row));
    }
    lines
}

/// Ascending numbers as ranges: `0-1, 3, 6-7`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).filter_map(|run| Some((run.first()?, run.last()?)));
    let texts: Vec<String> = runs
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_as_a_range() {
        assert_eq!(ranges(&[0, 1, 3, 6, 7, 8]), "0-1, 3, 6-8");
        assert_eq!(ranges(&[4]), "4");
    }
}
