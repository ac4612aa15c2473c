//! Means and percentiles of latencies.

use serde_json::{Map, Value};

/// Values in ascending order.
pub(super) struct Distribution {
    sorted: Vec<f64>,
}

impl Distribution {
    pub(super) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { sorted: values }
    }

    /// `None` of no values.
    pub(super) fn mean(&self) -> Option<f64> {
        (!self.sorted.is_empty()).then(|| self.sorted.iter().sum::<f64>() / self.sorted.len() as f64)
    }

    /// The value below which `percent` of the values lie, interpolated linearly as numpy does; `None` of no values.
    pub(super) fn percentile(&self, percent: f64) -> Option<f64> {
        let last = self.sorted.len().checked_sub(1)?;
        let position = percent / 100.0 * last as f64;
        let (below, above) =
            (self.sorted.get(position.floor() as usize)?, self.sorted.get(position.ceil() as usize)?);
        Some(below + (above - below) * position.fract())
    }

    /// `mean`, and a key for each of `percentiles`, such as `p50` and `p99.9`.
    pub(super) fn json(&self, percentiles: &[f64]) -> Value {
        let mut object = Map::from_iter([("mean".to_owned(), self.mean().into())]);
        object.extend(
            percentiles.iter().map(|percent| (format!("p{percent}"), self.percentile(*percent).into())),
        );
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([4, 1, 3, 2], [0, 50, 90, 99, 100])
        let values = Distribution::new(vec![4.0, 1.0, 3.0, 2.0]);
        for (percent, expected) in [(0.0, 1.0), (50.0, 2.5), (90.0, 3.7), (99.0, 3.97), (100.0, 4.0)] {
            let found = values.percentile(percent).unwrap();
            assert!((found - expected).abs() < 1e-12, "p{percent} is {found}, expected {expected}");
        }
        assert_eq!(values.mean(), Some(2.5));
    }

    #[test]
    fn nothing_has_no_mean() {
        let json = Distribution::new(vec![]).json(&[50.0, 99.9]);
        assert_eq!(json, serde_json::json!({"mean": null, "p50": null, "p99.9": null}));
    }
}
