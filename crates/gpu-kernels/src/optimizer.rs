//! AdamW over one flat tensor, and the sum of squares of its gradient.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::fault::{self, Fault};
use super::launch::{empty_vector, owned, per_unit};
use super::rows::sum_of_units;

/// Workgroups of [`squares`], and so the number of partial sums.
const PARTIAL: usize = 256;
/// Their units.
const UNITS: usize = 64;

/// Sums of squares: workgroup i adds every 256th group of 64 vectors, from the i-th on, always in the same order.
#[cube(launch_unchecked)]
pub fn squares<N: Size>(
    values: &[Vector<f32, N>],
    sums: &mut [f32],
    vectors: usize,
    #[comptime] fault: Fault,
) {
    let first = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(first, vectors, comptime!(PARTIAL * UNITS)) {
        sum = fma(values[i], values[i], sum);
    }
    let mut total = 0.0f32;
    #[unroll]
    for i in 0..N::value() {
        total += sum.extract(i);
    }
    let total = sum_of_units(total, UNITS);
    if UNIT_POS == 0 {
        let left_out = comptime!(fault == Fault::Squares) && CUBE_POS_X == 0;
        sums[CUBE_POS_X as usize] = select(left_out, 0.0f32, total);
    }
}

/// The numbers of an [`AdamW`](update) step.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Numbers {
    /// Multiplies the gradients.
    pub factor: f32,
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// Added to the denominator.
    pub epsilon: f32,
    /// `1 − β₁ᵗ`
    pub correction_1: f32,
    /// `1 − β₂ᵗ`
    pub correction_2: f32,
    /// What weight decay leaves of a parameter: `1 − learning rate · weight decay`.
    pub kept: f32,
    /// The learning rate.
    pub rate: f32,
}

/// One AdamW update; the moments are replaced. The order of operations is Burn's.
#[cube(launch_unchecked)]
pub fn update<N: Size>(
    parameters: &[Vector<f32, N>],
    gradients: &[Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    output: &mut [Vector<f32, N>],
    numbers: Numbers,
    vectors: usize,
    #[comptime] fault: Fault,
) {
    let at = ABSOLUTE_POS;
    if at < vectors {
        let one = 1.0f32;
        let g = gradients[at] * Vector::new(numbers.factor);
        let m = first[at] * Vector::new(numbers.beta_1) + g * Vector::new(one - numbers.beta_1);
        let v =
            second[at] * Vector::new(numbers.beta_2) + g * g * Vector::new(one - numbers.beta_2);
        let corrected = if comptime!(fault == Fault::Bias) {
            v
        } else {
            v / Vector::new(numbers.correction_2)
        };
        let step = m
            / Vector::new(numbers.correction_1)
            / (corrected.sqrt() + Vector::new(numbers.epsilon));
        output[at] = parameters[at] * Vector::new(numbers.kept) - step * Vector::new(numbers.rate);
        first[at] = m;
        second[at] = v;
    }
}

fn vector(count: usize) -> usize {
    if count.is_multiple_of(4) { 4 } else { 1 }
}

/// Launches [`squares`]: partial sums of squares, `[256]`, of `values`, `[count]` in f32.
pub fn launch_squares(values: CubeTensor) -> CubeTensor {
    let values = into_contiguous(values);
    let count = values.meta.shape()[0];
    let sums = empty_vector(&values, PARTIAL, DType::F32);
    let client = values.client.clone();
    unsafe {
        squares::launch_unchecked(
            &client,
            CubeCount::new_1d(PARTIAL as u32),
            CubeDim::new_1d(UNITS as u32),
            vector(count),
            values.into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            count / vector(count),
            fault::current(),
        );
    }
    sums
}

/// The numbers of a step, on the host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWNumbers {
    /// Multiplies the gradients.
    pub factor: f32,
    /// Decays of the moments.
    pub betas: [f32; 2],
    /// Added to the denominator.
    pub epsilon: f32,
    /// `1 − βᵗ` of both.
    pub corrections: [f32; 2],
    /// What weight decay leaves of a parameter.
    pub kept: f32,
    /// The learning rate.
    pub rate: f32,
}

/// Launches [`update`]: the new parameters, and the new moments in the memory of the old if nothing else holds it.
///
/// # Shapes
///
/// All `[count]`, f32.
pub fn launch_update(
    parameters: CubeTensor,
    gradients: CubeTensor,
    moments: [CubeTensor; 2],
    numbers: AdamWNumbers,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [parameters, gradients] = [parameters, gradients].map(into_contiguous);
    let [first, second] = moments.map(owned);
    let count = parameters.meta.shape()[0];
    let output = empty_vector(&parameters, count, DType::F32);
    let vectors = count / vector(count);
    let (cubes, units) = per_unit(vectors);
    let client = parameters.client.clone();
    let AdamWNumbers {
        factor,
        betas,
        epsilon,
        corrections,
        kept,
        rate,
    } = numbers;
    unsafe {
        update::launch_unchecked(
            &client,
            cubes,
            units,
            vector(count),
            parameters.into_buffer_arg(),
            gradients.into_buffer_arg(),
            first.clone().into_buffer_arg(),
            second.clone().into_buffer_arg(),
            output.clone().into_buffer_arg(),
            NumbersLaunch::new(
                factor,
                betas[0],
                betas[1],
                epsilon,
                corrections[0],
                corrections[1],
                kept,
                rate,
            ),
            vectors,
            fault::current(),
        );
    }
    (output, first, second)
}
