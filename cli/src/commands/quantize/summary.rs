//! What `nibble quantize` prints for people.

use nibble_quantizer::Report;
use nibble_quantizer::report::{Quality, RunReport};

/// The errors, the size, and how well the result does.
pub(super) fn print_summary(run: &RunReport) {
    print_matrices(&run.report);
    println!("{:.3} bits per weight, {:.1} s", run.report.bits_per_weight, run.seconds);
    if let Some(bytes) = run.peak_memory_bytes {
        println!("peak memory {:.2} GB", bytes as f64 / 1e9);
    }
    if let Some(quality) = &run.quality {
        let Quality { perplexity_before, perplexity_after, mean_kl_divergence, .. } = quality;
        let change = 100.0 * quality.perplexity_increase();
        println!("perplexity {perplexity_before:.4} before, {perplexity_after:.4} after ({change:+.2} %)");
        println!("mean KL divergence {mean_kl_divergence:.5} nats");
    }
}

/// The mean and the largest relative error of each kind of matrix.
fn print_matrices(report: &Report) {
    let measure = if report.errors_are_of_outputs { "output error" } else { "weight error" };
    println!("{:<12} {:>8} {:>18} {:>18}", "matrix", "count", format!("mean {measure}"), "largest, in layer");
    for kind in report.kinds() {
        let of_kind = || report.layers.iter().filter(|matrix| matrix.kind() == kind);
        let count = of_kind().count();
        let mean = of_kind().map(|matrix| matrix.relative_error).sum::<f64>() / count as f64;
        let largest = of_kind().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        if let Some(matrix) = largest {
            let layer = matrix.layer().map_or_else(String::new, |layer| format!(" ({layer})"));
            let largest = format!("{:.3} %{layer}", 100.0 * matrix.relative_error);
            println!("{kind:<12} {count:>8} {:>16.3} % {largest:>18}", 100.0 * mean);
        }
    }
}
