//! Rotary position embeddings. A unit rotates a vector of a head's first half with that of its second half.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{dims, element, empty, per_unit};

/// `(x₁, x₂) → scale · (x₁·cos − x₂·sin, x₂·cos + x₁·sin)`; `sign` −1 rotates backwards.
#[cube(launch_unchecked)]
pub fn rotate<F: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    output: &mut [Vector<F, N>],
    scale: f32,
    sign: f32,
    count: usize,
    #[comptime] heads: usize,
    #[comptime] half: usize,
    #[define(F)] _type: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let in_vector = N::value();
        let vectors = comptime!(half / in_vector);
        let dimension = at % vectors;
        let head = at / vectors;
        let angle = (head / heads) * vectors + dimension;
        let first = head * comptime!(2 * vectors) + dimension;
        let (c, s) = (
            cos[angle] * Vector::new(scale),
            sin[angle] * Vector::new(scale * sign),
        );
        let (a, b) = (
            Vector::<f32, N>::cast_from(x[first]),
            Vector::<f32, N>::cast_from(x[first + vectors]),
        );
        output[first] = Vector::cast_from(a * c - b * s);
        output[first + vectors] = Vector::cast_from(b * c + a * s);
    }
}

/// Launches [`rotate`].
///
/// # Shapes
///
/// - `x`, output: `[n, heads · d]`
/// - `cos`, `sin`: `[n, d / 2]`, f32
pub fn launch(
    x: CubeTensor,
    cos: CubeTensor,
    sin: CubeTensor,
    scale: f32,
    sign: f32,
) -> CubeTensor {
    let [x, cos, sin] = [x, cos, sin].map(into_contiguous);
    let ([n, width], half) = (dims(&x), dims(&cos)[1]);
    let (output, element) = (empty(&x, [n, width], x.dtype), element(x.dtype));
    let vector = if half.is_multiple_of(4) { 4 } else { 1 };
    let count = n * width / (2 * vector);
    let client = x.client.clone();
    let (cubes, units) = per_unit(count);
    unsafe {
        rotate::launch_unchecked(
            &client,
            cubes,
            units,
            vector,
            x.into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            output.clone().into_buffer_arg(),
            scale,
            sign,
            count,
            width / (2 * half),
            half,
            element,
        );
    }
    output
}
