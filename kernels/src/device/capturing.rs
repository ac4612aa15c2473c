//! A backend that shows the input of every matrix product to an observer: how calibration sees a model
//! without a forward pass of its own.

use std::cell::{RefCell, RefMut};
use std::ops::Range;

use crate::backend::{Backend, Device, MatrixShape};
use crate::error::KernelError;
use crate::ops;
use crate::tensor::{DenseMatrix, QuantizedMatrix};

/// Sees the inputs of matrix products.
pub trait LinearInput {
    /// Called before the product with the weight `name`: `values` is `[rows, in_features]`.
    fn linear_input(&mut self, name: &str, rows: usize, values: &[f32]);
}

/// A weight matrix that knows the name of its tensor.
pub struct Named<M> {
    name: String,
    matrix: M,
}

impl<M: MatrixShape> MatrixShape for Named<M> {
    fn out_features(&self) -> usize {
        self.matrix.out_features()
    }
    fn in_features(&self) -> usize {
        self.matrix.in_features()
    }
    fn bytes(&self) -> usize {
        self.matrix.bytes()
    }
}

/// The backend `B`, watched by an observer.
pub struct Capturing<B, O> {
    inner: B,
    observer: RefCell<O>,
}

impl<B: Backend, O: LinearInput> Capturing<B, O> {
    /// Watches `inner`.
    pub fn new(inner: B, observer: O) -> Self {
        Self { inner, observer: RefCell::new(observer) }
    }

    /// The observer, between operations.
    ///
    /// # Panics
    /// When the observer is already borrowed.
    pub fn observer(&self) -> RefMut<'_, O> {
        self.observer.borrow_mut()
    }

    fn capture(&self, name: &str, input: &B::Buffer, rows: usize, width: usize) -> Result<(), KernelError> {
        let mut values = vec![0.0; rows * width];
        self.inner.read(input, 0..rows * width, &mut values)?;
        self.observer.borrow_mut().linear_input(name, rows, &values);
        Ok(())
    }
}

impl<B: Backend, O: LinearInput> Device for Capturing<B, O> {
    type Buffer = B::Buffer;
    type Indices = B::Indices;
    type PackedMatrix = Named<B::PackedMatrix>;
    type DenseMatrix = Named<B::DenseMatrix>;

    fn buffer(&self, elements: usize) -> Self::Buffer {
        self.inner.buffer(elements)
    }
    fn indices(&self, elements: usize) -> Self::Indices {
        self.inner.indices(elements)
    }
    fn write(&self, values: &[f32], to: &mut Self::Buffer) -> Result<(), KernelError> {
        self.inner.write(values, to)
    }
    fn write_indices(&self, values: &[u32], to: &mut Self::Indices) -> Result<(), KernelError> {
        self.inner.write_indices(values, to)
    }
    fn read(&self, from: &Self::Buffer, range: Range<usize>, to: &mut [f32]) -> Result<(), KernelError> {
        self.inner.read(from, range, to)
    }
    fn pack_quantized(
        &self,
        name: &str,
        matrix: &QuantizedMatrix,
    ) -> Result<Self::PackedMatrix, KernelError> {
        Ok(Named { name: name.to_owned(), matrix: self.inner.pack_quantized(name, matrix)? })
    }
    fn pack_dense(&self, name: &str, matrix: &DenseMatrix<'_>) -> Result<Self::DenseMatrix, KernelError> {
        Ok(Named { name: name.to_owned(), matrix: self.inner.pack_dense(name, matrix)? })
    }
}

impl<B: Backend, O: LinearInput> ops::embedding::Embedding for Capturing<B, O> {
    fn embedding(
        &self,
        args: ops::embedding::Args<'_, Self::Buffer, Self::Indices, Self::DenseMatrix>,
    ) -> Result<(), KernelError> {
        let ops::embedding::Args { token_ids, table, output, rows } = args;
        self.inner.embedding(ops::embedding::Args { token_ids, table: &table.matrix, output, rows })
    }
}

impl<B: Backend, O: LinearInput> ops::dense_matmul::DenseMatmul for Capturing<B, O> {
    fn dense_matmul(
        &self,
        args: ops::dense_matmul::Args<'_, Self::Buffer, Self::DenseMatrix>,
    ) -> Result<(), KernelError> {
        args.check()?;
        let ops::dense_matmul::Args { input, weight, bias, output, rows } = args;
        self.capture(&weight.name, input, rows, weight.in_features())?;
        let weight = &weight.matrix;
        self.inner.dense_matmul(ops::dense_matmul::Args { input, weight, bias, output, rows })
    }
}

impl<B: Backend, O: LinearInput> ops::w4a16_matmul::W4a16Matmul for Capturing<B, O> {
    fn w4a16_matmul(
        &self,
        args: ops::w4a16_matmul::Args<'_, Self::Buffer, Self::PackedMatrix>,
    ) -> Result<(), KernelError> {
        args.check()?;
        let ops::w4a16_matmul::Args { input, weight, bias, output, rows } = args;
        self.capture(&weight.name, input, rows, weight.in_features())?;
        let weight = &weight.matrix;
        self.inner.w4a16_matmul(ops::w4a16_matmul::Args { input, weight, bias, output, rows })
    }
}

/// Operations that hold no weight matrix pass through.
macro_rules! pass_through {
    ($($module:ident::$operation:ident::$method:ident [$($argument:ident),*];)*) => {$(
        impl<B: Backend, O: LinearInput> ops::$module::$operation for Capturing<B, O> {
            fn $method(
                &self,
                args: ops::$module::Args<'_, $(Self::$argument),*>,
            ) -> Result<(), KernelError> {
                self.inner.$method(args)
            }
        }
    )*};
}
pass_through! {
    gather_rows::GatherRows::gather_rows [Buffer, Indices];
    rms_norm::RmsNorm::rms_norm [Buffer];
    rotary_embedding::RotaryEmbedding::rotary_embedding [Buffer, Indices];
    paged_attention::PagedAttention::paged_attention [Buffer, Indices];
    silu_mul::SiluMul::silu_mul [Buffer];
}
