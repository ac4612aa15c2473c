//! Numbers and settings as texts for people.

use minijinja::context;
use serde::Serialize;
use serde_json::Value;

use super::Quality;

/// A fraction as a percentage of three significant digits.
pub(super) fn percent(fraction: f64) -> String {
    let percent = 100.0 * fraction;
    let digits =
        if percent == 0.0 || !percent.is_finite() { 0.0 } else { 2.0 - percent.abs().log10().floor() };
    format!("{percent:.*} %", digits.clamp(0.0, 8.0) as usize)
}

/// The fields of `value` by name, those of objects within it by all their names.
///
/// # Errors
/// When a map in it has keys that are no texts.
pub(super) fn fields(value: &impl Serialize) -> Result<Vec<(String, String)>, serde_json::Error> {
    let mut rows = Vec::new();
    add_fields(&mut rows, "", &serde_json::to_value(value)?);
    Ok(rows)
}

fn add_fields(rows: &mut Vec<(String, String)>, name: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() {
                    field.replace('_', " ")
                } else {
                    format!("{name} {field}").replace('_', " ")
                };
                add_fields(rows, &name, value);
            }
        }
        Value::Null => {}
        Value::Array(items) => {
            let text = |item: &Value| item.as_str().map_or_else(|| item.to_string(), str::to_owned);
            rows.push((name.to_owned(), items.iter().map(text).collect::<Vec<_>>().join(", ")));
        }
        Value::Bool(value) => rows.push((name.to_owned(), if *value { "yes" } else { "no" }.to_owned())),
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        other => rows.push((name.to_owned(), other.to_string())),
    }
}

/// The measured quality as both the page and the model card tell it.
pub(super) fn quality(quality: &Quality) -> minijinja::Value {
    context! {
        before => format!("{:.4}", quality.perplexity_before),
        after => format!("{:.4}", quality.perplexity_after),
        increase => format!("{:+.2} %", 100.0 * quality.perplexity_increase()),
        kl => format!("{:.5}", quality.mean_kl_divergence),
        top1 => format!("{:.2} %", 100.0 * quality.top1_agreement),
        rms => format!("{:.3} %", 100.0 * quality.rms_probability_difference),
        text => quality.eval_text, window => quality.eval_window,
        predictions => quality.predicted_tokens,
    }
}
