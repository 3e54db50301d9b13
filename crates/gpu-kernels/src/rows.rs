//! Operations on whole rows: RMSNorm forward and backward, and cross entropy. One workgroup per row.
//!
//! Each unit reads every 64th vector of the row and keeps its sum in a register. The units' sums meet in shared memory
//! and are halved until one is left. Then each unit reads its vectors again, from the cache, and writes the result.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::fault::{self, Fault};
use super::launch::{dims, element, element_of_ints, empty, owned, workgroups};

type F4 = Vector<f32, Const<4>>;

/// The sum of a value over the units of a workgroup.
#[cube]
pub fn sum_of_units(value: f32, #[comptime] units: usize) -> f32 {
    let mut values = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    values[unit] = value;
    sync_cube();
    let halvings = comptime!(units.trailing_zeros() as usize);
    #[unroll]
    for step in 0..halvings {
        let half = comptime!(units >> (step + 1));
        if unit < half {
            let other = values[unit + half];
            values[unit] += other;
        }
        sync_cube();
    }
    let total = values[0];
    sync_cube();
    total
}

#[cube]
fn sum_of(vector: F4) -> f32 {
    vector.extract(0usize)
        + vector.extract(1usize)
        + vector.extract(2usize)
        + vector.extract(3usize)
}

/// `output = x / sqrt(mean(x²) + eps) · gain`, and the factor of each row.
#[cube(launch_unchecked)]
pub fn rms_norm<X: Float, O: Float>(
    x: &[Vector<X, Const<4>>],
    gain: &[F4],
    output: &mut [Vector<O, Const<4>>],
    inverse: &mut [f32],
    eps: f32,
    rows: usize,
    vectors: usize,
    #[comptime] units: usize,
    #[comptime] fault: Fault,
    #[define(X, O)] _types: [ElemType; 2],
) {
    // Workgroups beyond the last row compute it again: a barrier has to be reached by all units.
    let row = min(CUBE_POS, rows - 1);
    let unit = UNIT_POS as usize;
    let first = row * vectors;
    let mut squares = F4::new(0.0f32);
    for i in range_stepped(unit, vectors, units) {
        let value = F4::cast_from(x[first + i]);
        squares = fma(value, value, squares);
    }
    let counted = vectors * 4 + comptime!(if fault == Fault::Mean { 1usize } else { 0usize });
    let mean = sum_of_units(sum_of(squares), units) / f32::cast_from(counted);
    let factor = 1.0f32 / (mean + eps).sqrt();
    for i in range_stepped(unit, vectors, units) {
        let value = F4::cast_from(x[first + i]) * F4::new(factor) * gain[i];
        output[first + i] = Vector::cast_from(value);
    }
    if unit == 0 {
        inverse[row] = factor;
    }
}

/// `output = sum + ρ·w∘G − x·ρ³·mean(w∘G∘x)`, with ρ the row's `inverse`, w the gain and G the gradient; with `rounds`
/// also in `rounded`, which has another type.
#[cube(launch_unchecked)]
pub fn rms_norm_backward<X: Float, G: Float, S: Float, R: Float>(
    x: &[Vector<X, Const<4>>],
    inverse: &[f32],
    gain: &[F4],
    gradient: &[Vector<G, Const<4>>],
    sum: &[Vector<S, Const<4>>],
    output: &mut [Vector<S, Const<4>>],
    rounded: &mut [Vector<R, Const<4>>],
    rows: usize,
    vectors: usize,
    #[comptime] units: usize,
    #[comptime] rounds: bool,
    #[define(X, G, S, R)] _types: [ElemType; 4],
) {
    // Workgroups beyond the last row compute it again: a barrier has to be reached by all units.
    let row = min(CUBE_POS, rows - 1);
    let unit = UNIT_POS as usize;
    let first = row * vectors;
    let mut along = F4::new(0.0f32);
    for i in range_stepped(unit, vectors, units) {
        let weighted = F4::cast_from(gradient[first + i]) * gain[i];
        along = fma(weighted, F4::cast_from(x[first + i]), along);
    }
    let factor = inverse[row];
    let mean = sum_of_units(sum_of(along), units) / f32::cast_from(vectors * 4);
    let along = F4::new(mean * factor * factor * factor);
    for i in range_stepped(unit, vectors, units) {
        let weighted = F4::cast_from(gradient[first + i]) * gain[i];
        let change = weighted * F4::new(factor) - F4::cast_from(x[first + i]) * along;
        let value = F4::cast_from(sum[first + i]) + change;
        output[first + i] = Vector::cast_from(value);
        if rounds {
            rounded[first + i] = Vector::cast_from(value);
        }
    }
}

/// The cross entropy of each row of logits, whether its largest logit is the target's, and `scale · (softmax − one-hot)`
/// in the logits' place or in `gradient`.
#[cube(launch_unchecked)]
pub fn cross_entropy<I: Int, G: Float>(
    logits: &mut [f32],
    targets: &[I],
    losses: &mut [f32],
    hits: &mut [f32],
    gradient: &mut [G],
    scale: f32,
    rows: usize,
    vocab: usize,
    #[comptime] units: usize,
    #[comptime] in_place: bool,
    #[comptime] fault: Fault,
    #[define(I, G)] _types: [ElemType; 2],
) {
    // Workgroups beyond the last row compute it again: a barrier has to be reached by all units.
    let row = min(CUBE_POS, rows - 1);
    let unit = UNIT_POS as usize;
    let first = row * vocab;
    let target = usize::cast_from(targets[row]);
    let off = comptime!(if fault == Fault::Target {
        1usize
    } else {
        0usize
    });

    // The largest logit, and the first place where it is.
    let mut largest = Shared::<[f32]>::new_slice(units);
    let mut places = Shared::<[u32]>::new_slice(units);
    let mut most = f32::min_value();
    let mut place = vocab as u32;
    for i in range_stepped(unit, vocab, units) {
        let logit = logits[first + i];
        if logit > most {
            most = logit;
            place = i as u32;
        }
    }
    largest[unit] = most;
    places[unit] = place;
    sync_cube();
    let halvings = comptime!(units.trailing_zeros() as usize);
    #[unroll]
    for step in 0..halvings {
        let half = comptime!(units >> (step + 1));
        if unit < half {
            let (other, other_place) = (largest[unit + half], places[unit + half]);
            let mine = largest[unit];
            let better = other > mine || (other == mine && other_place < places[unit]);
            if better {
                largest[unit] = other;
                places[unit] = other_place;
            }
        }
        sync_cube();
    }
    let most = largest[0];
    let best = places[0];

    let mut sum = 0.0f32;
    for i in range_stepped(unit, vocab, units) {
        sum += (logits[first + i] - most).exp();
    }
    let total = sum_of_units(sum, units);
    if unit == 0 {
        losses[row] = total.ln() + most - logits[first + target];
        hits[row] = select(best == target as u32, 1.0f32, 0.0f32);
    }
    sync_cube();
    for i in range_stepped(unit, vocab, units) {
        let probability = (logits[first + i] - most).exp() / total;
        let value = (probability - select(i == target + off, 1.0f32, 0.0f32)) * scale;
        if in_place {
            logits[first + i] = value;
        } else {
            gradient[first + i] = G::cast_from(value);
        }
    }
}

/// The shape of an output that a kernel does not write.
const UNUSED: [usize; 2] = [1, 4];

/// Units of a workgroup. A driver that emulates a GPU runs eight at a time, and then a barrier costs nothing.
fn units() -> usize {
    if super::is_software_driver() { 8 } else { 64 }
}

/// As [`units`], for rows of this length. Mesa's software driver ends the loops of a unit without a word after 65,535
/// rounds, those of [`cross_entropy`] counted together.
fn units_for(length: usize) -> usize {
    if length > 1 << 17 { 64 } else { units() }
}

/// Launches [`rms_norm`]. The output has the type `dtype`.
///
/// # Shapes
///
/// - `x`, output: `[n, hidden]`; the factors: `[n, 1]`
/// - `gain`: `[1, hidden]`, f32
pub fn launch_rms_norm(
    x: CubeTensor,
    gain: CubeTensor,
    eps: f32,
    dtype: DType,
) -> (CubeTensor, CubeTensor) {
    let (x, gain) = (into_contiguous(x), into_contiguous(gain));
    let [n, hidden] = dims(&x);
    let (output, inverse) = (empty(&x, [n, hidden], dtype), empty(&x, [n, 1], DType::F32));
    let elements = [element(x.dtype), element(dtype)];
    let client = x.client.clone();
    unsafe {
        rms_norm::launch_unchecked(
            &client,
            workgroups(n),
            CubeDim::new_1d(units() as u32),
            x.into_buffer_arg(),
            gain.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            inverse.clone().into_buffer_arg(),
            eps,
            n,
            hidden / 4,
            units(),
            fault::current(),
            elements,
        );
    }
    (output, inverse)
}

/// Launches [`rms_norm_backward`]. The output has the type of `sum`; shapes as in [`launch_rms_norm`]. The second output
/// is the same in type `rounded`, and without one `[1, 4]` and never read.
pub fn launch_rms_norm_backward(
    x: CubeTensor,
    inverse: CubeTensor,
    gain: CubeTensor,
    gradient: CubeTensor,
    sum: CubeTensor,
    rounded: Option<DType>,
) -> (CubeTensor, CubeTensor) {
    let [x, inverse, gain] = [x, inverse, gain].map(into_contiguous);
    let [gradient, sum] = [gradient, sum].map(into_contiguous);
    let [n, hidden] = dims(&x);
    let output = empty(&x, [n, hidden], sum.dtype);
    let second = match rounded {
        Some(dtype) => empty(&x, [n, hidden], dtype),
        None => empty(&x, UNUSED, sum.dtype),
    };
    let elements = [&x, &gradient, &sum, &second].map(|tensor| element(tensor.dtype));
    let client = x.client.clone();
    unsafe {
        rms_norm_backward::launch_unchecked(
            &client,
            workgroups(n),
            CubeDim::new_1d(units() as u32),
            x.into_buffer_arg(),
            inverse.into_buffer_arg(),
            gain.into_buffer_arg(),
            gradient.into_buffer_arg(),
            sum.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            second.clone().into_buffer_arg(),
            n,
            hidden / 4,
            units(),
            rounded.is_some(),
            elements,
        );
    }
    (output, second)
}

/// Launches [`cross_entropy`]. Returns the gradient in `dtype`, each row's loss and hit.
///
/// # Shapes
///
/// - `logits`, gradient: `[m, vocab]`; logits are f32
/// - `targets`, losses, hits: `[m]`
pub fn launch_cross_entropy(
    logits: CubeTensor,
    targets: CubeTensor,
    scale: f32,
    dtype: DType,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let in_place = dtype == DType::F32;
    let logits = if in_place {
        owned(logits)
    } else {
        into_contiguous(logits)
    };
    let targets = into_contiguous(targets);
    let [m, vocab] = dims(&logits);
    let units = units_for(vocab);
    let gradient = empty(&logits, if in_place { UNUSED } else { [m, vocab] }, dtype);
    let [losses, hits] = [(); 2].map(|()| super::launch::empty_vector(&logits, m, DType::F32));
    let elements = [element_of_ints(targets.dtype), element(dtype)];
    let client = logits.client.clone();
    unsafe {
        cross_entropy::launch_unchecked(
            &client,
            workgroups(m),
            CubeDim::new_1d(units as u32),
            logits.clone().into_buffer_arg(),
            targets.into_buffer_arg(),
            losses.clone().into_buffer_arg(),
            hits.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            scale,
            m,
            vocab,
            units,
            in_place,
            fault::current(),
            elements,
        );
    }
    (if in_place { logits } else { gradient }, losses, hits)
}
