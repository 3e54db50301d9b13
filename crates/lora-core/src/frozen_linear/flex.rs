//! The CPU: weight panels are unpacked into a cache-sized buffer that the product then reads.
//!
//! Flex's own `dequantize` is a scalar loop that divides to find each element's block, and takes
//! longer than the product it feeds. Here the block's scale is applied to a run of integers at
//! once, in the widest vectors that the processor has, on all threads.

use burn::backend::ops::{FloatTensorOps, QTensorOps};
use burn::backend::tensor::{FloatTensor, QuantizedTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, TensorData};
use gemm::Parallelism;
use rayon::prelude::*;

/// Floats in a panel: 1 MiB, so that a panel stays in the cache between its unpacking and its use.
const PANEL: usize = 256 * 1024;

/// Below this many multiply-adds, starting threads costs more than it brings.
const PARALLEL_FROM: usize = 192 * 192 * 192;

type Float = FloatTensor<Flex>;
type Quantized = QuantizedTensor<Flex>;

/// `x · W`: x `[n, d_in]`, W `[d_in, d_out]`, output `[n, d_out]`.
pub fn forward(x: Float, weight: Quantized) -> Float {
    let Some(packed) = Packed::read(&x, &weight) else {
        let dense = Flex::dequantize(weight, x.dtype().into());
        return Flex::float_matmul(x, dense);
    };
    let x = x.to_contiguous();
    let (d_in, d_out) = (packed.d_in, packed.d_out);
    let n = x.shape()[0];
    let input = &x.storage::<f32>()[x.layout().start_offset()..];
    let mut output = vec![0f32; n * d_out];
    // Panels are rows of W: each adds its share of the inner sum to the whole output.
    packed.for_each_panel(|first_row, rows, panel| {
        let x_panel = &input[first_row.min(input.len())..];
        product(
            Operand {
                data: x_panel,
                row_stride: d_in,
                col_stride: 1,
            },
            Operand {
                data: panel,
                row_stride: d_out,
                col_stride: 1,
            },
            [n, rows, d_out],
            &mut output,
            d_out,
            first_row > 0,
        );
    });
    from_vec(output, [n, d_out])
}

/// `dY · Wᵀ`: dY `[n, d_out]`, W `[d_in, d_out]`, output `[n, d_in]`.
pub fn backward(grad: Float, weight: Quantized) -> Float {
    let Some(packed) = Packed::read(&grad, &weight) else {
        let dense = Flex::dequantize(weight, grad.dtype().into());
        return Flex::float_matmul(grad, Flex::float_transpose(dense));
    };
    let grad = grad.to_contiguous();
    let (d_in, d_out) = (packed.d_in, packed.d_out);
    let n = grad.shape()[0];
    let grad = &grad.storage::<f32>()[grad.layout().start_offset()..];
    let mut output = vec![0f32; n * d_in];
    // Panels are rows of W, that is columns of Wᵀ: each gives some columns of the output.
    packed.for_each_panel(|first_row, rows, panel| {
        let out_panel = &mut output[first_row.min(n * d_in)..];
        product(
            Operand {
                data: grad,
                row_stride: d_out,
                col_stride: 1,
            },
            Operand {
                data: panel,
                row_stride: 1,
                col_stride: d_out,
            },
            [n, d_out, rows],
            out_panel,
            d_in,
            false,
        );
    });
    from_vec(output, [n, d_in])
}

fn from_vec(values: Vec<f32>, shape: [usize; 2]) -> Float {
    Flex::float_from_data(TensorData::new(values, shape), &Default::default())
}

/// A quantized weight's integers and scales, where they lie as this file expects them.
struct Packed<'a> {
    integers: &'a [i8],
    scales: &'a [f32],
    d_in: usize,
    d_out: usize,
    block: usize,
}

impl<'a> Packed<'a> {
    /// `None` for layouts and types that the general path must handle: a transposed or per-tensor
    /// weight, blocks over several rows, a second scale level, activations that are not f32.
    fn read(x: &Float, weight: &'a Quantized) -> Option<Self> {
        let tensor = weight.tensor();
        let DType::QFloat(scheme) = weight.dtype() else {
            return None;
        };
        let [d_in, d_out] = weight.shape().dims::<2>();
        let block = match scheme.block_size() {
            Some(size) => match size.to_dim_vec(2)[..] {
                [1, block] => block as usize,
                _ => return None,
            },
            None => return None,
        };
        let plain = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let fits = block > 0
            && d_out.is_multiple_of(block)
            && weight.scales().len() * block == d_in * d_out;
        let one_level = scheme.num_levels() == 1;
        let usable =
            plain && fits && one_level && x.dtype() == DType::F32 && x.shape().num_dims() == 2;
        usable.then(|| Self {
            integers: &tensor.storage::<i8>()[..d_in * d_out],
            scales: weight.scales(),
            d_in,
            d_out,
            block,
        })
    }

    /// Calls `work(first_row, rows, panel)` for panels of whole rows, in order.
    fn for_each_panel(&self, mut work: impl FnMut(usize, usize, &[f32])) {
        let rows = (PANEL / self.d_out.max(1)).clamp(1, self.d_in.max(1));
        let mut buffer = vec![0f32; rows * self.d_out];
        let mut first = 0;
        while first < self.d_in {
            let rows = rows.min(self.d_in - first);
            let panel = &mut buffer[..rows * self.d_out];
            self.unpack(first, panel);
            work(first, rows, panel);
            first += rows;
        }
    }

    /// Dequantizes the rows from `first` on into `panel`.
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        let integers = &self.integers[first * self.d_out..][..panel.len()];
        let scales = &self.scales[first * self.d_out / self.block..][..panel.len() / self.block];
        // Pieces of about 64 KiB of floats, whole blocks each.
        let piece = (16 * 1024 / self.block).max(1) * self.block;
        panel
            .par_chunks_mut(piece)
            .zip(integers.par_chunks(piece))
            .zip(scales.par_chunks(piece / self.block))
            .for_each(|((panel, integers), scales)| {
                unpack_blocks(panel, integers, scales, self.block)
            });
    }
}

/// `panel[i] = integers[i] · scales[i / block]`.
fn unpack_blocks(panel: &mut [f32], integers: &[i8], scales: &[f32], block: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the features were just detected.
            return unsafe { unpack_avx512(panel, integers, scales, block) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was just detected.
            return unsafe { unpack_avx2(panel, integers, scales, block) };
        }
    }
    unpack_generic(panel, integers, scales, block);
}

// The same loop, compiled for wider vectors: the compiler's vectorizer does the rest.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack_avx512(panel: &mut [f32], integers: &[i8], scales: &[f32], block: usize) {
    unpack_generic(panel, integers, scales, block);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn unpack_avx2(panel: &mut [f32], integers: &[i8], scales: &[f32], block: usize) {
    unpack_generic(panel, integers, scales, block);
}

#[inline(always)]
fn unpack_generic(panel: &mut [f32], integers: &[i8], scales: &[f32], block: usize) {
    // The usual block as a constant lets the compiler unroll the inner loop without remainders.
    match block {
        32 => unpack_fixed::<32>(panel, integers, scales),
        _ => {
            let blocks = panel
                .chunks_exact_mut(block)
                .zip(integers.chunks_exact(block));
            for ((panel, integers), scale) in blocks.zip(scales) {
                for (value, integer) in panel.iter_mut().zip(integers) {
                    *value = *integer as f32 * scale;
                }
            }
        }
    }
}

#[inline(always)]
fn unpack_fixed<const BLOCK: usize>(panel: &mut [f32], integers: &[i8], scales: &[f32]) {
    let (panel, _) = panel.as_chunks_mut::<BLOCK>();
    let (integers, _) = integers.as_chunks::<BLOCK>();
    for ((panel, integers), scale) in panel.iter_mut().zip(integers).zip(scales) {
        for (value, integer) in panel.iter_mut().zip(integers) {
            *value = *integer as f32 * scale;
        }
    }
}

struct Operand<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

impl Operand<'_> {
    /// Panics unless a `rows × cols` matrix with these strides lies within the data.
    fn check(&self, rows: usize, cols: usize) {
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
            assert!(
                last < self.data.len(),
                "a {rows}x{cols} operand passes its data"
            );
        }
    }
}

/// `output (+)= left · right` for left `[m, k]`, right `[k, n]` and an output with rows
/// `output_stride` apart.
fn product(
    left: Operand,
    right: Operand,
    [m, k, n]: [usize; 3],
    output: &mut [f32],
    output_stride: usize,
    accumulate: bool,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    left.check(m, k);
    right.check(k, n);
    assert!(
        (m - 1) * output_stride + n <= output.len(),
        "the output is too small"
    );
    let parallelism = match m * n * k >= PARALLEL_FROM {
        true => Parallelism::Rayon(0),
        false => Parallelism::None,
    };
    // SAFETY: the bounds of all three matrices were checked above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            output.as_mut_ptr(),
            1,
            output_stride as isize,
            accumulate,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
