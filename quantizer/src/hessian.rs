//! The Hessian of a linear layer's squared output error: what its inputs have in common.
//!
//! ```text
//! H[i, j] = sum over calibration tokens of x[i] * x[j]          x [inputs]
//! |(W - Wq) X|^2 = sum over outputs n of d[n] H d[n]^T          d = W - Wq
//! ```
//!
//! Sums are in `f32`, one token block after the other; the factorization is in `f64`. The order of sums
//! depends on the shapes alone, so that results do not depend on the number of threads.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::reborrow::{Reborrow, ReborrowMut};
use faer::{Accum, Mat, MatMut, MatRef, Par, Spec};

/// Rows of a weight matrix whose error is computed at once.
const ERROR_ROWS: usize = 256;

/// Columns that are inverted at once.
const INVERSE_BLOCK: usize = 256;

/// `X^T X`, symmetric.
pub(crate) struct Hessian {
    sums: Mat<f32>,
}

/// Sums a [`Hessian`].
pub(crate) struct HessianSum {
    sums: Mat<f32>,
}

impl HessianSum {
    /// Of no tokens.
    pub(crate) fn new(inputs: usize) -> Self {
        Self { sums: Mat::zeros(inputs, inputs) }
    }

    /// Adds tokens: `values` is row-major `[tokens, inputs]`.
    pub(crate) fn add(&mut self, values: &[f32], par: Par) {
        let inputs = self.sums.nrows();
        let rows = MatRef::from_row_major_slice(values, values.len() / inputs.max(1), inputs);
        triangular::matmul(
            self.sums.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            rows.transpose(),
            BlockStructure::Rectangular,
            rows,
            BlockStructure::Rectangular,
            1.0,
            par,
        );
    }

    /// The sum, both triangles.
    pub(crate) fn finish(mut self) -> Hessian {
        let inputs = self.sums.nrows();
        for column in 0..inputs {
            for row in 0..column {
                self.sums[(row, column)] = self.sums[(column, row)];
            }
        }
        Hessian { sums: self.sums }
    }
}

impl Hessian {
    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.sums.nrows()
    }

    /// `H[input, input]`.
    pub(crate) fn diagonal(&self, input: usize) -> f32 {
        self.sums[(input, input)]
    }

    /// The mean of the diagonal, 1 where that is 0: what damping is a fraction of.
    pub(crate) fn mean_diagonal(&self) -> f64 {
        let sum: f64 = (0..self.inputs()).map(|input| f64::from(self.diagonal(input))).sum();
        if sum > 0.0 { sum / self.inputs() as f64 } else { 1.0 }
    }

    /// The upper triangular `U`, row-major `[inputs, inputs]`, with `U^T U = (H' + damping * mean * I)^-1`,
    /// where `H'` has the inputs in the given `order` and `mean` is [`Self::mean_diagonal`]. `None` when the damped matrix is not positive definite.
    ///
    /// With `H' = R R^T` for an upper triangular `R` (the Cholesky factor of the reversed matrix, reversed
    /// again), `U` is `R^-1`: one factorization and one triangular inverse.
    pub(crate) fn inverse_factor(&self, order: &[usize], damping: f64, par: Par) -> Option<Vec<f32>> {
        let inputs = self.inputs();
        let mean = self.mean_diagonal();
        let reversed = |index: usize| order[inputs - 1 - index];
        let mut factor = Mat::<f64>::zeros(inputs, inputs);
        for column in 0..inputs {
            for row in column..inputs {
                factor[(row, column)] = f64::from(self.sums[(reversed(row), reversed(column))]);
            }
            factor[(column, column)] += damping * mean;
        }
        let params: Spec<LltParams, f64> = Spec::default();
        let mut scratch = MemBuffer::new(cholesky_in_place_scratch::<f64>(inputs, par, params));
        let stack = MemStack::new(&mut scratch);
        cholesky_in_place(factor.as_mut(), LltRegularization::default(), par, stack, params).ok()?;
        invert_in_place(factor.as_mut(), par);
        let mut upper = vec![0.0; inputs * inputs];
        for (row, upper) in upper.chunks_exact_mut(inputs.max(1)).enumerate() {
            for column in row..inputs {
                let value = factor[(inputs - 1 - row, inputs - 1 - column)] as f32;
                if !value.is_finite() {
                    return None;
                }
                upper[column] = value;
            }
        }
        Some(upper)
    }

    /// What each input has of the sum over rows of `d H d^T`: `d[i] * (H d^T)[i]`, summed over rows. `rows` is
    /// row-major `[any, inputs]`. The part of an input whose error makes up for that of others is negative.
    pub(crate) fn energy_by_input(&self, rows: &[f32], par: Par) -> Vec<f64> {
        let inputs = self.inputs();
        let mut products = vec![0.0f32; ERROR_ROWS.min(rows.len() / inputs.max(1)) * inputs];
        let mut energies = vec![0.0; inputs];
        for rows in rows.chunks(ERROR_ROWS * inputs.max(1)) {
            let count = rows.len() / inputs;
            let products = &mut products[..rows.len()];
            matmul(
                MatMut::from_row_major_slice_mut(products, count, inputs),
                Accum::Replace,
                MatRef::from_row_major_slice(rows, count, inputs),
                self.sums.as_ref(),
                1.0,
                par,
            );
            for (rows, products) in rows.chunks_exact(inputs).zip(products.chunks_exact(inputs)) {
                for ((energy, &d), &p) in energies.iter_mut().zip(rows).zip(products) {
                    *energy += f64::from(d) * f64::from(p);
                }
            }
        }
        energies
    }
}

/// Replaces the lower triangle of `matrix` by its inverse; what is above the diagonal is not looked at.
///
/// ```text
/// [ A 0 ]^-1   [     A^-1         0   ]
/// [ B C ]    = [ -C^-1 B A^-1    C^-1 ]
/// ```
///
/// Blocks of columns from right to left: `C` is inverted already when `B` is. The largest matrices of a 70B model take
/// 6.6 GB as `f64`; a second one for the result would not fit beside them.
fn invert_in_place(mut matrix: MatMut<'_, f64>, par: Par) {
    let size = matrix.nrows();
    let mut end = size;
    while end > 0 {
        let first = (end - 1) / INVERSE_BLOCK * INVERSE_BLOCK;
        let (width, below) = (end - first, size - end);
        let mut diagonal = Mat::<f64>::zeros(width, width);
        let block = matrix.rb().submatrix(first, first, width, width);
        invert_lower_triangular(diagonal.as_mut(), block, par);
        let mut product = Mat::<f64>::zeros(below, width);
        let structure = BlockStructure::TriangularLower;
        triangular::matmul(
            product.as_mut(),
            BlockStructure::Rectangular,
            Accum::Replace,
            matrix.rb().submatrix(end, end, below, below),
            structure,
            matrix.rb().submatrix(end, first, below, width),
            BlockStructure::Rectangular,
            -1.0,
            par,
        );
        triangular::matmul(
            matrix.rb_mut().submatrix_mut(end, first, below, width),
            BlockStructure::Rectangular,
            Accum::Replace,
            product.as_ref(),
            BlockStructure::Rectangular,
            diagonal.as_ref(),
            structure,
            1.0,
            par,
        );
        for column in 0..width {
            for row in column..width {
                matrix[(first + row, first + column)] = diagonal[(row, column)];
            }
        }
        end = first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triangle_is_inverted_where_it_stands() {
        for size in [1, 7, INVERSE_BLOCK, INVERSE_BLOCK + 1, 2 * INVERSE_BLOCK + 30] {
            let triangle = Mat::<f64>::from_fn(size, size, |row, column| match row.cmp(&column) {
                std::cmp::Ordering::Less => f64::NAN,
                std::cmp::Ordering::Equal => 2.0 + (row % 5) as f64,
                std::cmp::Ordering::Greater => ((row * 31 + column * 17) % 23) as f64 / 23.0 / size as f64,
            });
            let mut inverse = triangle.clone();
            invert_in_place(inverse.as_mut(), Par::Seq);
            for row in 0..size {
                for column in 0..=row {
                    let product: f64 =
                        (column..=row).map(|k| triangle[(row, k)] * inverse[(k, column)]).sum();
                    let expected = if row == column { 1.0 } else { 0.0 };
                    assert!((product - expected).abs() < 1e-12, "{size}: {row}, {column}: {product}");
                }
            }
        }
    }
}
