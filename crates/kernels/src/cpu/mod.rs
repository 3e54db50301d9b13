//! The CPU's kernels, and their common parts: views of matrices, the product, loops over rows on all threads and with
//! the widest vectors, and an exponential for such loops.
//!
//! Burn's CPU backend runs one operation after the other, each through memory. A fused kernel reads and writes once.

pub(crate) mod attention;
pub(crate) mod frozen_linear;
mod kernels;
pub(crate) mod kv_cache;
mod loss;
mod products;
mod quantized;
mod rms_norm;
mod rope;
mod swiglu;

pub use attention::heads_apart;
pub use frozen_linear::{has_bf16_products, use_bf16_products};
pub(crate) use kernels::Cpu;
pub(crate) use quantized::compact;

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{DType, Device, Tensor, TensorData};
use gemm::Parallelism;
use rayon::prelude::*;

/// A tensor of Burn's CPU backend.
pub type FlexTensor = FloatTensor<Flex>;

/// With fewer multiply-adds, starting threads costs more time than it saves.
const PARALLEL_FROM: usize = 192 * 192 * 192;

/// The smallest number of floats in one thread's chunk of rows: 64 KiB.
const PIECE: usize = 16 * 1024;

/// Whether the CPU's kernels apply: f32 on Burn's CPU backend, outside an autodiff graph.
pub fn is_native<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_on_cpu(x)
}

/// Whether a tensor is on Burn's CPU backend, outside an autodiff graph.
pub fn is_on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    !x.is_autodiff() && is_cpu(&x.device())
}

/// Whether this is Burn's CPU backend, with or without autodiff.
pub fn is_cpu(device: &Device) -> bool {
    matches!(
        device.clone().without_autodiff().as_dispatch(),
        DispatchDevice::Flex(_)
    )
}

/// The values of a tensor on Burn's CPU backend, contiguous from the buffer's first element on. Copies only a tensor
/// that is a slice or a transposed view of its buffer.
///
/// # Panics
///
/// Unless [`is_native`].
pub fn values<const D: usize>(x: Tensor<D>) -> Values {
    Values::new(primitive_of(x))
}

/// The backend's tensor, in its current layout.
///
/// # Panics
///
/// Unless [`is_native`].
pub fn primitive_of<const D: usize>(x: Tensor<D>) -> FlexTensor {
    match x.try_into_primitive::<Flex>() {
        Ok(tensor) => tensor,
        Err(error) => panic!("a CPU kernel got a tensor of another backend: {error:?}"),
    }
}

/// See [`values`].
#[derive(Debug, Clone)]
pub struct Values(FlexTensor);

impl Values {
    /// # Panics
    ///
    /// If the tensor is not f32.
    pub fn new(tensor: FlexTensor) -> Self {
        assert_eq!(tensor.dtype(), DType::F32, "CPU kernels compute in f32");
        Self(tensor.to_contiguous())
    }

    /// All elements, row-major.
    pub fn as_slice(&self) -> &[f32] {
        self.0.storage()
    }

    /// As [`as_slice`](Self::as_slice), mutable; copies first if another tensor shares the buffer.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        self.0.storage_mut()
    }

    /// Converts back to a tensor.
    pub fn into_tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(self.0)
    }

    /// Converts back to the backend's tensor.
    pub fn into_primitive(self) -> FlexTensor {
        self.0
    }
}

/// A tensor on the CPU from its elements, row-major.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(primitive(values, shape))
}

/// As [`tensor`], but the backend's tensor.
pub fn primitive<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    Flex::float_from_data(TensorData::new(values, shape), &Default::default())
}

/// A view of a matrix in borrowed memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × columns` in `data`, whose rows begin `stride` apart.
    ///
    /// # Panics
    ///
    /// If the data ends before the matrix.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        Self {
            data,
            rows,
            columns,
            row_stride: stride,
            column_stride: 1,
        }
    }

    /// `rows × columns` in `data` with these distances between rows and between columns.
    ///
    /// # Panics
    ///
    /// If the data ends before the matrix.
    pub fn strided(
        data: &'a [f32],
        [rows, columns]: [usize; 2],
        [row_stride, column_stride]: [usize; 2],
    ) -> Self {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * row_stride + (columns - 1) * column_stride;
            assert!(
                last < data.len(),
                "a {rows}x{columns} view passes its {} elements",
                data.len()
            );
        }
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride,
        }
    }

    /// Its number of columns.
    pub fn columns(self) -> usize {
        self.columns
    }

    fn place(&self) -> Place<f32> {
        Place {
            data: self.data.as_ptr(),
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        }
    }

    /// The same memory read as the transposed matrix.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

fn check(length: usize, rows: usize, columns: usize, stride: usize) {
    let needed = match rows {
        0 => 0,
        _ => (rows - 1) * stride + columns,
    };
    assert!(
        needed <= length,
        "a {rows}x{columns} matrix with rows {stride} apart passes its {length} elements"
    );
}

/// A mutable view of a matrix.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    lifetime: std::marker::PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// `rows × columns` in `data`, whose rows begin `stride` apart.
    ///
    /// # Panics
    ///
    /// If the data ends before the matrix.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        Self {
            data: data.as_mut_ptr(),
            rows,
            columns,
            row_stride: stride,
            lifetime: std::marker::PhantomData,
        }
    }

    fn place(&self) -> Place<f32> {
        Place {
            data: self.data,
            row_stride: self.row_stride,
            column_stride: 1,
        }
    }

    /// A view of `columns` columns of `rows` rows. Other threads may write other columns of the same rows.
    ///
    /// # Safety
    ///
    /// `data` points to `(rows - 1) · stride + columns` elements that live for `'a`, and no other thread reads or
    /// writes these columns meanwhile.
    pub unsafe fn from_raw(data: *mut f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            row_stride: stride,
            lifetime: std::marker::PhantomData,
        }
    }
}

/// The threads that compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// All threads, if the product is large enough.
    All,
    /// The calling thread.
    One,
}

/// `output = scale · left · right`, or `output +=` that.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn multiply(
    output: MatrixMut,
    accumulate: bool,
    scale: f32,
    left: Matrix,
    right: Matrix,
    threads: Threads,
) {
    let (m, k, n) = (left.rows, left.columns, right.columns);
    assert!(
        right.rows == k && output.rows == m && output.columns == n,
        "{m}x{k} times {}x{n} into {}x{}",
        right.rows,
        output.rows,
        output.columns
    );
    if m == 0 || n == 0 {
        return;
    }
    let (output, left, right) = (output.place(), left.place(), right.place());
    let pieces = match threads {
        Threads::All if m * n * k >= PARALLEL_FROM => rayon::current_num_threads(),
        _ => 1,
    };
    let part = |rows: Range<usize>, columns: Range<usize>| {
        let output = output.part(rows.start, columns.start);
        multiply_part(
            output,
            accumulate,
            scale,
            left.part(rows.start, 0),
            right.part(0, columns.start),
            [rows.len(), k, columns.len()],
        );
    };
    if pieces == 1 {
        part(0..m, 0..n);
    } else if n >= m {
        // Every thread computes different columns, so that none waits for another.
        let each = n.div_ceil(pieces).next_multiple_of(COLUMNS_AT_ONCE);
        let starts = (0..n).into_par_iter().step_by(each);
        starts.for_each(|start| part(0..m, start..(start + each).min(n)));
    } else {
        let each = m.div_ceil(pieces).next_multiple_of(ROWS_AT_ONCE);
        let starts = (0..m).into_par_iter().step_by(each);
        starts.for_each(|start| part(start..(start + each).min(m), 0..n));
    }
}

/// The width of the product's micro-tile on most processors; parts are multiples of it.
const COLUMNS_AT_ONCE: usize = 48;
const ROWS_AT_ONCE: usize = 6;

/// A pointer into a matrix, checked against its memory when it is made.
#[derive(Clone, Copy)]
struct Place<T> {
    data: *const T,
    row_stride: usize,
    column_stride: usize,
}

// SAFETY: threads share inputs only; their parts of the output do not overlap.
unsafe impl<T> Sync for Place<T> {}
unsafe impl<T> Send for Place<T> {}

impl<T> Place<T> {
    /// The part that starts `rows` rows down and `columns` columns to the right.
    fn part(self, rows: usize, columns: usize) -> Self {
        let offset = rows * self.row_stride + columns * self.column_stride;
        Self {
            data: self.data.wrapping_add(offset),
            ..self
        }
    }
}

fn multiply_part(
    output: Place<f32>,
    accumulate: bool,
    scale: f32,
    left: Place<f32>,
    right: Place<f32>,
    [m, k, n]: [usize; 3],
) {
    // SAFETY: each matrix was checked against its memory when it was made, and the part lies within it.
    // With `accumulate` false the output is written without being read, as it must be where it is not
    // initialised.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            output.data.cast_mut(),
            output.column_stride as isize,
            output.row_stride as isize,
            accumulate,
            left.data,
            left.column_stride as isize,
            left.row_stride as isize,
            right.data,
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `scale · left · right` in new memory, `[left rows, right columns]`.
pub fn product(scale: f32, left: Matrix, right: Matrix, threads: Threads) -> Vec<f32> {
    let (rows, columns) = (left.rows, right.columns);
    let mut output = Vec::with_capacity(rows * columns);
    // SAFETY: the vector has that capacity, and the product writes all of it (zeros for an empty inner
    // dimension) without reading it.
    unsafe {
        let view = MatrixMut::from_raw(output.as_mut_ptr(), rows, columns, columns);
        multiply(view, false, scale, left, right, threads);
        output.set_len(rows * columns);
    }
    output
}

/// `[rows, columns]` → `[columns, rows]`, in tiles that fit the cache, on all threads.
pub fn transposed<T: Copy + Default + Send + Sync>(
    values: &[T],
    [rows, columns]: [usize; 2],
) -> Vec<T> {
    const TILE: usize = 64;
    let mut output = vec![T::default(); values.len()];
    output
        .par_chunks_mut((TILE * rows).max(1))
        .enumerate()
        .for_each(|(tile, output)| {
            let first = tile * TILE;
            let count = TILE.min(columns - first);
            for start in (0..rows).step_by(TILE) {
                for row in start..rows.min(start + TILE) {
                    for column in 0..count {
                        output[column * rows + row] = values[row * columns + first + column];
                    }
                }
            }
        });
    output
}

/// Makes a `rows × width` matrix: `fill(first row, piece)` must write every element of its chunk of whole rows. Chunks
/// are filled on all threads; `fill` calls a function of [`in_vectors!`](crate::in_vectors).
pub fn fill_rows(
    rows: usize,
    width: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync,
) -> Vec<f32> {
    let mut output = Vec::with_capacity(rows * width);
    for_each_piece(
        &mut output.spare_capacity_mut()[..rows * width],
        width,
        |first, piece| fill(first, piece),
    );
    // SAFETY: `fill` has written every element.
    unsafe { output.set_len(rows * width) };
    output
}

/// Calls `work(first row, piece)` for chunks of whole rows of `width` elements, on all threads. `work` calls a function
/// of [`in_vectors!`](crate::in_vectors).
pub fn for_each_piece<T: Send>(
    data: &mut [T],
    width: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    let rows = (PIECE / width.max(1)).max(1);
    let pieces = data.par_chunks_mut(rows * width.max(1));
    pieces
        .enumerate()
        .for_each(|(piece, data)| work(piece * rows, data));
}

/// Rows per call of [`for_each_piece`], for loops over several matrices at once.
pub fn rows_per_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// The work of [`vectorized`].
///
/// It is not a closure: the compiler may not inline a closure that the functions for several kinds of processors call,
/// and then compiles it for the smallest vectors. See also [`in_vectors!`](crate::in_vectors).
pub trait Work {
    /// The result.
    type Output;

    /// Does the work. Implementations and the functions that they call are `#[inline(always)]`. `FUSED` means that the
    /// processor multiplies and adds in one instruction.
    fn run<const FUSED: bool>(self) -> Self::Output;
}

/// The vector instructions of this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// AVX-512 F and BW.
    Avx512,
    /// AVX2 and FMA (multiply and add in one instruction).
    Avx2,
    /// The vectors of every processor of the target.
    Baseline,
}

/// The widest vectors of this processor.
#[inline(always)]
pub fn vectors() -> Vectors {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return Vectors::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Vectors::Avx2;
        }
    }
    Vectors::Baseline
}

/// Defines a function that is compiled for each kind of [`Vectors`] and runs the variant for this processor.
///
/// Functions that the body calls must be `#[inline(always)]`, and the body must not have a closure that is called
/// twice. A call costs a few nanoseconds: pass a row or more.
#[macro_export]
macro_rules! in_vectors {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        $visibility fn $name($($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($argument: $type),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw")]
            fn avx512($($argument: $type),*) $(-> $output)? {
                body($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $output)? {
                body($($argument),*)
            }

            match $crate::cpu::vectors() {
                // SAFETY: the processor has these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Vectors::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Vectors::Avx2 => unsafe { avx2($($argument),*) },
                _ => body($($argument),*),
            }
        }
    };
}

/// `a · b + c`, rounded once if `FUSED`. Without FMA, rounding once would be a function call.
#[inline(always)]
pub(crate) fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Runs `work` compiled for the processor's widest vectors.
#[inline(always)]
pub fn vectorized<W: Work>(work: W) -> W::Output {
    match vectors() {
        // SAFETY: the processor has them.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => unsafe { with_avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => unsafe { with_avx2(work) },
        _ => work.run::<{ cfg!(target_arch = "aarch64") }>(),
    }
}

// The compiler inlines the work and vectorizes it with the features of the calling function.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_avx512<W: Work>(work: W) -> W::Output {
    work.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run::<true>()
}

/// Prefetches the cache line at `index`, which may be beyond the data. No effect on processors without the instruction.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let place = data.as_ptr().wrapping_add(index);
        // SAFETY: prefetching is valid for every address, and every processor of this kind supports it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, index);
}

/// eˣ with a relative error of at most 2e-7, in operations that compilers vectorize.
///
/// As in Cephes' `expf`: x = n·ln 2 + r, a polynomial for eʳ, and n added to the exponent. Below -87 the result is 0 or
/// close to 0, above 88 it is near the largest float.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts; the first is exact in few bits.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2²³ rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_66;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    // The low bits of `shifted` are n.
    let exponent = (shifted.to_bits() as i32).wrapping_add(127) << 23;
    p * f32::from_bits(exponent as u32)
}

/// The number of independent sums of [`dot`] and similar functions, so that they fill vectors.
pub const LANES: usize = 32;

/// Σ aᵢ·bᵢ in an order that depends on the length only.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b[..a.len()].as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    add_lanes(sums) + rest
}

/// Σ aᵢ·bᵢ·cᵢ in an order that depends on the length only.
#[inline(always)]
pub fn dot_of_three(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b[..a.len()].as_chunks::<LANES>();
    let (c_lanes, c_rest) = c[..a.len()].as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for ((a, b), c) in a_lanes.iter().zip(b_lanes).zip(c_lanes) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane] * c[lane];
        }
    }
    let rest = a_rest.iter().zip(b_rest).zip(c_rest);
    let rest: f32 = rest.map(|((a, b), c)| a * b * c).sum();
    add_lanes(sums) + rest
}

/// The largest element, or negative infinity.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let (lanes, rest) = a.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for a in lanes {
        for lane in 0..LANES {
            best[lane] = if a[lane] > best[lane] {
                a[lane]
            } else {
                best[lane]
            };
        }
    }
    best.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, b| a.max(*b))
}

/// Replaces each xᵢ by e to the power of xᵢ - `shift` and returns their sum.
#[inline(always)]
pub fn exp_and_sum(x: &mut [f32], shift: f32) -> f32 {
    let (lanes, rest) = x.as_chunks_mut::<LANES>();
    let mut sums = [0f32; LANES];
    for x in lanes {
        for lane in 0..LANES {
            x[lane] = exp(x[lane] - shift);
            sums[lane] += x[lane];
        }
    }
    let mut sum = 0.0;
    for x in rest {
        *x = exp(*x - shift);
        sum += *x;
    }
    add_lanes(sums) + sum
}

/// The sum of the [`LANES`] independent sums, in a fixed order.
#[inline(always)]
pub fn add_lanes(sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut sums = sums;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_has_a_relative_error_of_at_most_2e_7() {
        let worst = (-870_000..880_000)
            .map(|i| i as f32 / 10_000.0)
            .map(|x| ((exp(x) as f64) / (x as f64).exp() - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1.3e-38 && exp(1e30).is_finite());
    }

    #[test]
    fn products_of_views_equal_those_of_the_matrices() {
        let a: Vec<f32> = (0..35).map(|i| (i as f32).sin()).collect();
        let b: Vec<f32> = (0..40).map(|i| (i as f32).cos()).collect();
        // 3×4 in rows of 7, and the transpose of 5×4 in rows of 8.
        let left = Matrix::new(&a, 3, 4, 7);
        let right = Matrix::new(&b, 5, 4, 8).transposed();
        let got = product(2.0, left, right, Threads::One);
        for row in 0..3 {
            for column in 0..5 {
                let sum: f32 = (0..4).map(|k| a[row * 7 + k] * b[column * 8 + k]).sum();
                assert!((got[row * 5 + column] - 2.0 * sum).abs() < 1e-6);
            }
        }
        let mut twice = got.clone();
        multiply(
            MatrixMut::new(&mut twice, 3, 5, 5),
            true,
            2.0,
            left,
            right,
            Threads::One,
        );
        for (twice, once) in twice.iter().zip(&got) {
            assert!((twice - 2.0 * once).abs() < 1e-5);
        }
    }

    #[test]
    fn sums_and_maxima_take_every_element_once() {
        for length in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..length).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..length).map(|i| (i % 5) as f32).collect();
            // Small integers: exact in any order.
            let expected: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), expected);
            let squares: f32 = a.iter().zip(&b).map(|(a, b)| a * b * b).sum();
            assert_eq!(dot_of_three(&a, &b, &b), squares);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut powers = a.clone();
            let sum = exp_and_sum(&mut powers, 1.0);
            let expected: f32 = a.iter().map(|a| (a - 1.0).exp()).sum();
            assert!((sum - expected).abs() <= 1e-5 * expected);
            assert!((sum - powers.iter().sum::<f32>()).abs() <= 1e-5 * expected);
        }
    }

    #[test]
    #[should_panic(expected = "passes its")]
    fn a_view_past_its_data_panics() {
        let _ = Matrix::new(&[0.0; 10], 3, 4, 4);
    }

    #[test]
    fn transposing_twice_restores_the_matrix() {
        let values: Vec<i8> = (0..70 * 133).map(|i| (i % 251) as u8 as i8).collect();
        let there = transposed(&values, [70, 133]);
        assert_eq!(there[5 * 70 + 7], values[7 * 133 + 5]);
        assert_eq!(transposed(&there, [133, 70]), values);
    }

    #[test]
    fn every_row_is_filled_once() {
        let width = 300;
        let filled = fill_rows(1000, width, |first, piece| {
            for (i, value) in piece.iter_mut().enumerate() {
                value.write((first * width + i) as f32);
            }
        });
        assert!(
            filled
                .iter()
                .enumerate()
                .all(|(i, value)| *value == i as f32)
        );
    }
}
