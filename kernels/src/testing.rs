//! What the tests of several operations share.

use crate::backend::Device;

/// `count` reproducible values in -1.0..1.0.
pub(crate) fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A device buffer that holds `values`.
pub(crate) fn upload<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device.buffer(values.len()).expect("there is memory for a test");
    device.write(values, &mut buffer).expect("the buffer was made for these values");
    buffer
}
