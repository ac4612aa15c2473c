//! What the tests of several operations share.

use crate::backend::Device;
pub(crate) use crate::check::random;

/// A device buffer that holds `values`.
pub(crate) fn upload<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device.buffer(values.len()).expect("there is memory for a test");
    device.write(values, &mut buffer).expect("the buffer was made for these values");
    buffer
}
