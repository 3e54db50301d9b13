//! The CPU with AVX512-BF16: products with an 8-bit weight as pairs of bf16 numbers, summed in f32.
//!
//! `vdpbf16ps` multiplies 32 pairs of bf16 numbers and adds them to 16 sums. So activations are rounded to bf16 once
//! per call. Each thread unpacks cache-sized panels of the weight into pairs along the inner dimension; the pairs of 32
//! columns ("lanes") of the output are contiguous.
//!
//! # Error
//!
//! Rounding to bf16 changes a number by up to 2⁻⁸ of itself, 1.7e-3 in the root mean square.
//!
//! - Backward (`g · Wᵀ`): the sum runs over weights of a block, which share a scale. The product uses the integers,
//!   which are exact in bf16, and the scale multiplies the f32 sum of each block. Only the activations are rounded:
//!   relative Frobenius error against f32 about 1.7e-3.
//! - Forward (`x · W`): every term of a sum has a different scale. Scaled activations would have to be rounded again
//!   for every block of columns, a third of the product's time. So the weight is scaled and then rounded. Both factors
//!   are rounded: about 2.4e-3.
//!
//! Sums run in f32 in a fixed order: results do not depend on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::Direction;
use super::tiles::{
    self, Activations, LANES, Lanes, Output, Panel, ROWS, SEGMENT, Sums, transposed_words,
};

/// A quantized weight: `W[k][j] = integers[k · d_out + j] · scales[(k · d_out + j) / block]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight<'a> {
    /// `[d_in, d_out]`.
    pub integers: &'a [i8],
    /// `[d_in, d_out / block]`.
    pub scales: &'a [f32],
    pub d_in: usize,
    pub d_out: usize,
    /// The block size. Divides `d_out`, and is even, so that no pair has two scales.
    pub block: usize,
}

/// Whether the processor (and the operating system) can run [`forward`] and [`backward`].
pub(crate) fn is_supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x · W`.
///
/// # Shapes
///
/// - `x`: `[n, d_in]`
/// - `output`: `[n, d_out]`
///
/// # Panics
///
/// If the shapes do not fit, the block is odd, or the processor lacks the instructions.
pub(crate) fn forward(x: &[f32], n: usize, weight: Weight, output: Output) {
    native(x, n, weight, Direction::Forward, output);
}

/// `g · Wᵀ`.
///
/// # Shapes
///
/// - `g`: `[n, d_out]`
/// - `output`: `[n, d_in]`
///
/// # Panics
///
/// As [`forward`].
pub(crate) fn backward(g: &[f32], n: usize, weight: Weight, output: Output) {
    native(g, n, weight, Direction::Backward, output);
}

/// Compares a small product in each direction, computed with this processor's instructions, with an emulation.
///
/// # Errors
///
/// The first difference, or that the processor lacks the instructions.
pub(crate) fn self_check() -> Result<(), String> {
    if !is_supported() {
        return Err("the processor has no AVX512-BF16".into());
    }
    let (n, d_in, d_out, block) = (ROWS + 5, 2 * LANES + 7, LANES + 12, 4);
    // Numbers of few bits, whose sums are exact in every order, so that results must be equal. The last bit of an
    // activation is rounded off.
    let number = |i: usize, range: usize| ((i * i + i / 3) % range) as f32 - (range / 2) as f32;
    let integers: Vec<i8> = (0..d_in * d_out).map(|i| number(i, 255) as i8).collect();
    let scales: Vec<f32> = (0..d_in * d_out / block)
        .map(|i| [0.25, 0.5, 1.0, 2.0][i * i % 7 % 4])
        .collect();
    let weight = Weight {
        integers: &integers,
        scales: &scales,
        d_in,
        d_out,
        block,
    };
    for direction in [Direction::Forward, Direction::Backward] {
        let (inner, outer) = direction.inner_and_outer([weight.d_in, weight.d_out]);
        let x: Vec<f32> = (0..n * inner)
            .map(|i| number(i, 15) * (1.0 + f32::EPSILON))
            .collect();
        let mut results = [vec![1f32; n * outer], vec![1f32; n * outer]];
        let [expected, computed] = &mut results;
        product::<Emulated>(&x, n, weight, direction, Output::Sum(expected));
        native(&x, n, weight, direction, Output::Sum(computed));
        if let Some(i) = (0..n * outer).find(|&i| expected[i] != computed[i]) {
            return Err(format!(
                "AVX512-BF16 gives {} instead of {} in row {}, column {} of the {direction:?} check",
                computed[i],
                expected[i],
                i / outer,
                i % outer,
            ));
        }
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn native(x: &[f32], n: usize, weight: Weight, direction: Direction, output: Output) {
    assert!(is_supported(), "the processor has no AVX512-BF16");
    product::<Avx512>(x, n, weight, direction, output);
}

#[cfg(not(target_arch = "x86_64"))]
fn native(_: &[f32], _: usize, _: Weight, _: Direction, _: Output) {
    unreachable!("the processor has no AVX512-BF16");
}

/// Sums of products of pairs.
trait PairSums: Sums {
    /// [`round`], compiled for the processor that has the instructions.
    fn round(pairs: &mut [u32], x: &[f32]) {
        round(pairs, x);
    }
}

#[cfg(target_arch = "x86_64")]
type Avx512 = super::avx512::Avx512<true>;

#[cfg(target_arch = "x86_64")]
impl PairSums for Avx512 {
    fn round(pairs: &mut [u32], x: &[f32]) {
        // Callees are inlined, so that the target features apply to them.
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn compiled(pairs: &mut [u32], x: &[f32]) {
            round(pairs, x);
        }
        // SAFETY: the processor has the instructions, by the type's contract.
        unsafe { compiled(pairs, x) }
    }
}

/// An emulation in plain Rust, for processors without the instructions and for comparison.
#[derive(Clone, Copy)]
struct Emulated([f32; 16]);

/// `sum + a · b` as `vdpbf16ps` computes it: rounded once, to nearest even; subnormal numbers count
/// as zero and become zero (Intel, Software Developer's Manual, volume 2, "VDPBF16PS"; Bochs' model
/// of Sapphire Rapids gives the same bits).
fn fused_add(sum: f32, a: u32, b: u32) -> f32 {
    let flushed = |x: f32| {
        if x.is_subnormal() {
            0f32.copysign(x)
        } else {
            x
        }
    };
    let [a, b, sum] = [f32::from_bits(a), f32::from_bits(b), sum].map(flushed);
    flushed(a.mul_add(b, sum))
}

impl PairSums for Emulated {}

impl Sums for Emulated {
    const NUMBERS: usize = 2;
    const CHUNK: usize = 4096;

    fn zero() -> Self {
        Self([0.0; 16])
    }

    fn add_products(mut self, pair: u32, pairs: &[u32; 16]) -> Self {
        for (sum, other) in self.0.iter_mut().zip(pairs) {
            *sum = fused_add(*sum, pair & 0xffff_0000, other & 0xffff_0000);
            *sum = fused_add(*sum, pair << 16, other << 16);
        }
        self
    }

    fn added_to(self, before: [f32; 16], scales: Option<&[f32; 16]>) -> [f32; 16] {
        std::array::from_fn(|i| match scales {
            Some(scales) => self.0[i].mul_add(scales[i], before[i]),
            None => self.0[i] + before[i],
        })
    }
}

/// `x · W` or `x · Wᵀ` for `x` of `n` rows.
fn product<S: PairSums>(x: &[f32], n: usize, weight: Weight, direction: Direction, output: Output) {
    let (inner, outer) = direction.inner_and_outer([weight.d_in, weight.d_out]);
    let Weight {
        d_in, d_out, block, ..
    } = weight;
    assert!(
        block.is_multiple_of(2) && block > 0 && d_out.is_multiple_of(block),
        "rows of {d_out} weights have no blocks of {block}"
    );
    assert!(
        d_in * d_out > 0
            && weight.integers.len() == d_in * d_out
            && weight.scales.len() * block == d_in * d_out,
        "a weight of {d_in}x{d_out}"
    );
    assert_eq!(x.len(), n * inner, "{n} rows of {inner}");
    let pairs = Pairs::new::<S>(x, inner, n);
    let x = Activations {
        items: &pairs.pairs,
        stride: pairs.stride,
    };
    let pairs = WeightPairs { weight, direction };
    tiles::product::<S>(x, [n, inner, outer], &pairs, output);
}

/// The nearest bf16 number, in the lower half; ties go to the even one, NaN stays NaN.
#[inline(always)]
fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() {
        bits >> 16 | 0x40
    } else {
        (bits + 0x7fff + (bits >> 16 & 1)) >> 16
    }
}

/// Activations as pairs of bf16 numbers, row-major; an odd last number is paired with zero.
struct Pairs {
    pairs: Vec<u32>,
    /// The stride of rows: an odd number of cache lines, so that rows do not evict one another.
    stride: usize,
}

impl Pairs {
    fn new<S: PairSums>(x: &[f32], inner: usize, rows: usize) -> Self {
        let stride = (inner.div_ceil(32) | 1) * 16;
        let mut pairs = vec![0; rows * stride];
        (pairs.par_chunks_mut(stride).zip(x.par_chunks(inner)))
            .with_min_len(16)
            .for_each(|(pairs, x)| S::round(pairs, x));
        Self { pairs, stride }
    }
}

/// Rounds a row of activations to pairs of bf16 numbers.
#[inline(always)]
fn round(pairs: &mut [u32], x: &[f32]) {
    let (twos, last) = x.as_chunks::<2>();
    for (pair, [a, b]) in pairs.iter_mut().zip(twos) {
        *pair = bf16(*a) | bf16(*b) << 16;
    }
    if let [last] = last {
        pairs[twos.len()] = bf16(*last);
    }
}

/// The panels of a weight: pairs along the dimension that the product sums over.
struct WeightPairs<'a> {
    weight: Weight<'a>,
    direction: Direction,
}

impl tiles::Weight for WeightPairs<'_> {
    fn unit(&self) -> usize {
        self.weight.block
    }

    #[inline(always)]
    fn fill<S: Sums>(&self, panel: &mut Panel, tiles: Range<usize>, inner: Range<usize>) {
        for (tile, items) in panel.items.chunks_exact_mut(panel.height).enumerate() {
            let first = (tiles.start + tile) * LANES;
            match self.direction {
                Direction::Forward => unpack_columns(items, self.weight, first, inner.clone()),
                Direction::Backward => {
                    unpack_rows::<S>(items, self.weight, first, inner.clone());
                    push_scales(&mut panel.scales, self.weight, first, inner.clone());
                }
            }
        }
        if self.direction == Direction::Backward {
            panel.run = self.weight.block / 2;
        }
    }
}

/// A forward tile: columns of W from `first` on, with their scales.
///
/// Loops instead of iterators and closures, which the compiler may compile without the target features of
/// [`Sums::columns`].
#[inline(always)]
fn unpack_columns(items: &mut [Lanes<u32>], weight: Weight, first: usize, rows: Range<usize>) {
    let width = (weight.d_out - first).min(LANES);
    let blocks_in_row = weight.d_out / weight.block;
    let mut blocks = [0; LANES];
    for (lane, block) in blocks.iter_mut().enumerate() {
        *block = (first + lane.min(width - 1)) / weight.block;
    }
    let row = |k: usize| {
        let integers = &weight.integers[k * weight.d_out + first..];
        let scales = &weight.scales[k * blocks_in_row..][..blocks_in_row];
        (integers, scales)
    };
    for (pair, k) in items.iter_mut().zip(rows.clone().step_by(2)) {
        let mut new: Lanes<u32> = [[0; 16]; 2];
        add_row::<0>(&mut new, row(k), &blocks);
        if k + 1 < rows.end {
            add_row::<16>(&mut new, row(k + 1), &blocks);
        }
        *pair = new;
    }
}

/// A backward tile: rows of W from `first` on, as integers.
#[inline(always)]
fn unpack_rows<S: Sums>(
    items: &mut [Lanes<u32>],
    weight: Weight,
    first: usize,
    columns: Range<usize>,
) {
    let d_out = weight.d_out;
    let width = (weight.d_in - first).min(LANES);
    let segments = items.chunks_mut(SEGMENT / 2);
    for (items, column) in segments.zip(columns.clone().step_by(SEGMENT)) {
        let count = SEGMENT.min(columns.end - column);
        let from = &weight.integers[first * d_out + column..];
        let words = transposed_words::<S>(from, d_out, width, count);
        for (i, pair) in items.iter_mut().enumerate() {
            let mut new: Lanes<u32> = [[0; 16]; 2];
            for half in 0..2 {
                for lane in 0..16 {
                    new[half][lane] = widen(words[i / 2][half][lane] >> (i % 2 * 16));
                }
            }
            *pair = new;
        }
    }
}

/// The scales of a backward tile's blocks.
#[inline(always)]
fn push_scales(scales: &mut Vec<Lanes<f32>>, weight: Weight, first: usize, columns: Range<usize>) {
    let blocks_in_row = weight.d_out / weight.block;
    let width = (weight.d_in - first).min(LANES);
    let blocks = columns.start / weight.block..columns.end / weight.block;
    let before = scales.len();
    scales.resize(before + blocks.len(), [[0.0; 16]; 2]);
    // A row's scales lie side by side, a column's rows apart.
    for lane in 0..width {
        let row = &weight.scales[(first + lane) * blocks_in_row..][blocks.clone()];
        for (lanes, scale) in scales[before..].iter_mut().zip(row) {
            lanes.as_flattened_mut()[lane] = *scale;
        }
    }
}

/// Writes a tile's weights, rounded to bf16, to one half of its pairs. Lanes beyond the end of W get arbitrary values
/// or zero; their results are never stored.
#[inline(always)]
fn add_row<const SHIFT: u32>(
    pairs: &mut Lanes<u32>,
    (integers, scales): (&[i8], &[f32]),
    blocks: &[usize; LANES],
) {
    let row = match integers.first_chunk() {
        Some(row) => *row,
        None => padded(integers),
    };
    let mut factors = [scales[blocks[0]]; LANES];
    if blocks[0] != blocks[LANES - 1] {
        for lane in 0..LANES {
            factors[lane] = scales[blocks[lane]];
        }
    }
    let pairs = pairs.as_flattened_mut();
    for lane in 0..LANES {
        pairs[lane] |= bf16(row[lane] as f32 * factors[lane]) << SHIFT;
    }
}

/// The rare case, in a separate function, so that the usual case is a load instead of a call of `memcpy`.
#[cold]
#[inline(never)]
fn padded(integers: &[i8]) -> [i8; LANES] {
    let mut row = [0; LANES];
    row[..integers.len()].copy_from_slice(integers);
    row
}

/// The lower two bytes, signed integers, as a pair of bf16 numbers: eight bits are exact.
#[inline(always)]
fn widen(bytes: u32) -> u32 {
    let low = (bytes << 24) as i32 >> 24;
    let high = (bytes << 16) as i32 >> 24;
    (low as f32).to_bits() >> 16 | (high as f32).to_bits() & 0xffff_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CounterRng;

    /// Random integers, scales and activations for both directions.
    struct Case([usize; 4], Vec<i8>, Vec<f32>, Vec<f32>);

    impl Case {
        fn new([n, d_in, d_out, block]: [usize; 4]) -> Self {
            let mut rng = CounterRng::new((n * d_in + d_out * block) as u64);
            let mut normal = |count, scale| {
                let number = |_| rng.normal() as f32 * scale;
                (0..count).map(number).collect::<Vec<_>>()
            };
            let integers = normal(d_in * d_out, 50.0);
            let integers = integers.into_iter().map(|x| x as i8).collect();
            let scales = normal(d_in * d_out / block, 0.02);
            let x = normal(n * d_in.max(d_out), 1.0);
            Self([n, d_in, d_out, block], integers, scales, x)
        }

        fn weight(&self) -> Weight<'_> {
            let Self([_, d_in, d_out, block], integers, scales, _) = self;
            Weight {
                integers,
                scales,
                d_in: *d_in,
                d_out: *d_out,
                block: *block,
            }
        }

        fn compute<S: PairSums>(&self, direction: Direction, sum: Option<f32>) -> Vec<f32> {
            let (inner, outer) = direction.inner_and_outer([self.0[1], self.0[2]]);
            let (n, x) = (self.0[0], &self.3);
            let mut output = Vec::with_capacity(n * outer);
            if let Some(sum) = sum {
                output.resize(n * outer, sum);
            }
            let place = match sum {
                Some(_) => Output::Sum(&mut output),
                None => Output::New(&mut output.spare_capacity_mut()[..n * outer]),
            };
            product::<S>(&x[..n * inner], n, self.weight(), direction, place);
            // SAFETY: there is room, and the product has written all of it.
            unsafe { output.set_len(n * outer) };
            output
        }

        /// In f64, with activations (`true`) and weights rounded by `round`.
        fn expected(&self, direction: Direction, round: impl Fn(f32, bool) -> f64) -> Vec<f64> {
            let weight = self.weight();
            let (inner, outer) = direction.inner_and_outer([weight.d_in, weight.d_out]);
            let value = |i: usize| weight.integers[i] as f32 * weight.scales[i / weight.block];
            let w: Vec<f64> = (0..weight.integers.len())
                .map(|i| round(value(i), false))
                .collect();
            let x: Vec<f64> = self.3.iter().map(|&x| round(x, true)).collect();
            let element = |i: usize| {
                let (row, column) = (i / outer, i % outer);
                let term = |k: usize| match direction {
                    Direction::Forward => x[row * inner + k] * w[k * weight.d_out + column],
                    Direction::Backward => x[row * inner + k] * w[column * weight.d_out + k],
                };
                (0..inner).map(term).sum()
            };
            (0..self.0[0] * outer).map(element).collect()
        }
    }

    /// Frobenius norm of the difference over that of `expected`.
    fn relative(computed: &[f32], expected: &[f64], sum: f64) -> f64 {
        assert_eq!(computed.len(), expected.len());
        let pairs = computed.iter().zip(expected);
        let difference: f64 = pairs.map(|(c, e)| (*c as f64 - sum - e).powi(2)).sum();
        let norm: f64 = expected.iter().map(|e| e.powi(2)).sum();
        (difference / norm).sqrt()
    }

    const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Backward];

    /// Shapes with full and partial tiles, strips, runs and chunks.
    const SHAPES: [[usize; 4]; 14] = [
        [1, 1, 2, 2],
        [1, 33, 40, 8],
        [3, 5, 4, 4],
        [7, 64, 96, 32],
        [7, 31, 160, 32],
        [12, 32, 32, 32],
        [16, 9, 66, 6],
        [33, 101, 172, 4],
        [33, 65, 80, 16],
        [33, 200, 320, 32],
        [280, 70, 96, 32],
        [280, 45, 104, 8],
        [2, 8225, 64, 32],
        [2, 35, 8256, 64],
    ];

    fn check<S: PairSums>(name: &str) {
        let bf16 = |x: f32| f32::from_bits(bf16(x) << 16) as f64;
        for shape in SHAPES {
            let case = Case::new(shape);
            for direction in DIRECTIONS {
                let fresh = case.compute::<S>(direction, None);
                // The rounding is known, so that only the order of the f32 sums differs.
                let rounded = case.expected(direction, |x, activation| {
                    if activation || direction == Direction::Forward {
                        bf16(x)
                    } else {
                        x as f64
                    }
                });
                let error = relative(&fresh, &rounded, 0.0);
                assert!(error < 2e-6, "{name} {shape:?} {direction:?}: {error:e}");
                let sum = case.compute::<S>(direction, Some(0.5));
                let error = relative(&sum, &rounded, 0.5);
                assert!(error < 2e-6, "{name} {shape:?} {direction:?} +=: {error:e}");
                let exact = case.expected(direction, |x, _| x as f64);
                let error = relative(&fresh, &exact, 0.0);
                println!("{name} {shape:?} {direction:?}: {error:.2e} against f32");
                let bound = if fresh.len() < 1000 { 8e-3 } else { 4e-3 };
                assert!(error < bound, "{name} {shape:?} {direction:?}: {error:e}");
            }
        }
    }

    #[test]
    fn products_equal_those_of_rounded_factors_and_are_near_those_of_f32() {
        check::<Emulated>("emulated");
        #[cfg(target_arch = "x86_64")]
        if is_supported() {
            check::<Avx512>("AVX512-BF16");
        }
    }

    #[test]
    fn the_processor_and_the_emulation_agree() {
        if is_supported() {
            assert_eq!(self_check(), Ok(()))
        } else {
            assert!(self_check().is_err())
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let case = Case::new([33, 200, 320, 32]);
        for direction in DIRECTIONS {
            let [one, three] = [1, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap()
                    .install(|| case.compute::<Emulated>(direction, None))
            });
            assert_eq!(one, three);
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_infinities_and_nan() {
        let round = |x: f32| f32::from_bits(bf16(x) << 16);
        let step = 2f32.powi(-7);
        assert_eq!(round(1.0 + 0.5 * step), 1.0);
        assert_eq!(round(1.0 + 1.5 * step), 1.0 + 2.0 * step);
        assert_eq!(round(-1.0 - 0.51 * step), -1.0 - step);
        assert_eq!(round(f32::MAX), f32::INFINITY);
        assert_eq!(round(f32::NEG_INFINITY), f32::NEG_INFINITY);
        assert!(round(f32::NAN).is_nan() && round(f32::from_bits(0x7fff_ffff)).is_nan());
        for integer in i8::MIN..=i8::MAX {
            assert_eq!(round(integer as f32), integer as f32);
        }
    }

    #[test]
    fn the_emulation_treats_subnormal_numbers_as_zero() {
        let one = 1f32.to_bits();
        assert_eq!(fused_add(f32::from_bits(1), one, one), 1.0);
        assert_eq!(fused_add(0.0, 0x0040_0000, 0x7f00_0000), 0.0);
        assert_eq!(fused_add(0.0, 0x0080_0000, 0.5f32.to_bits()), 0.0);
        assert_eq!(fused_add(1.0, one, one), 2.0);
    }
}
