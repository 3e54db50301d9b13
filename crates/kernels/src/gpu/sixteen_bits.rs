//! The kernels for 16-bit tensors against the CPU in f32: those for matrix units where the device has them.
//!
//! Inputs are rounded to 16 bits first, so that both compute the same. What remains:
//!
//! - products: sums of products in another order, as in f32, if the output is f32. Matrix units round the dequantized
//!   weight to 16 bits; the reference is rounded too. One factor is a power of two, because Mesa's software driver rounds
//!   each product to f16; NVIDIA's matrix units do not round products.
//! - attention: weights and gradients of scores rounded to 16 bits (11 bits of f16, 8 of bf16), and outputs. Each is
//!   off by at most half a unit of its last place, and errors of many keys cancel in part.

use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::tests::{BOUND, JOINT, Weight, distance, joint_terms, layout, on, segments_and_heads};
use super::{joins, packed_product, shape};
use crate::{
    CounterRng, Direction, LowRankPart, LowRankTerm, Quantization, attention, attention_backward,
    gated_product, gated_product_backward, joint_product, normal, query_scale, swiglu,
    swiglu_backward,
};

/// The 16-bit types of a device.
pub fn types(gpu: &Device) -> Vec<DType> {
    let types = [
        (FloatDType::F16, DType::F16),
        (FloatDType::BF16, DType::BF16),
    ];
    let supported = types
        .into_iter()
        .filter(|(float, _)| gpu.supports_dtype(*float));
    supported.map(|(_, dtype)| dtype).collect()
}

/// `x` on the GPU in `dtype`, and the same values in f32 on the CPU.
fn rounded(x: &Tensor<2>, dtype: DType, gpu: &Device) -> [Tensor<2>; 2] {
    let on_gpu = on(gpu, x).cast(dtype);
    // Read in 16 bits: in one fused kernel, a driver may skip the rounding between two casts.
    let data = on_gpu.clone().into_data().convert::<f32>();
    [on_gpu, Tensor::from_data(data, (&x.device(), DType::F32))]
}

/// Each value replaced by ±1/2, ±1 or ±2.
fn powers_of_two(x: Tensor<2>) -> Tensor<2> {
    let sizes = x
        .clone()
        .abs()
        .add_scalar(0.5)
        .clamp(0.5, 2.0)
        .round()
        .clamp(0.5, 2.0);
    x.sign() * sizes
}

pub fn products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(11);
    let ours = Weight::Ours;
    for dtype in types(gpu) {
        for (weight, n, d_in, d_out, rank) in [
            // One row, few rows, sizes that are no multiples of a tile or of anything.
            (ours(Quantization::Bits8), 1, 64, 32, 1),
            (ours(Quantization::Bits8), 7, 100, 172, 3),
            (ours(Quantization::Bits8), 130, 576, 288, 8),
            (ours(Quantization::Bits8), 65, 258, 132, 40),
            (ours(Quantization::Bits4), 70, 96, 224, 2),
            (Weight::Gguf, 129, 224, 131, 16),
        ] {
            let [on_cpu, on_gpu] = weight.on([d_in, d_out], &mut rng, [&cpu, gpu]);
            let dense = on_cpu.dequantize();
            let [_, dense_rounded] = rounded(&dense, dtype, gpu);
            for direction in [Direction::Forward, Direction::Backward] {
                let (k, m) = direction.inner_and_outer([d_in, d_out]);
                let mut random = |shape| normal(shape, 1.0, &mut rng, &cpu);
                let (sum, first) = (random([n, m]), n % 3);
                let [x_gpu, x] = rounded(&powers_of_two(random([n, k])), dtype, gpu);
                let low = powers_of_two(random([first + rank + 1, n]));
                let [low_gpu, low] = rounded(&low, dtype, gpu);
                let [b_gpu, b] = rounded(&random([rank, m]), dtype, gpu);
                for with_low in [false, true] {
                    let term = LowRankTerm {
                        low: LowRankPart {
                            all: low_gpu.clone().cast(DType::F32).transpose(),
                            first,
                            rank,
                        },
                        b: b_gpu.clone().cast(DType::F32),
                    };
                    let got = packed_product(
                        Some(on(gpu, &sum)),
                        x_gpu.clone(),
                        on_gpu.clone(),
                        with_low.then_some(term),
                        direction,
                    );
                    let expected = |dense: &Tensor<2>| {
                        let w = match direction {
                            Direction::Forward => dense.clone(),
                            Direction::Backward => dense.clone().transpose(),
                        };
                        let product = sum.clone() + x.clone().matmul(w);
                        let low = low.clone().narrow(0, first, rank).transpose();
                        if with_low {
                            product + low.matmul(b.clone())
                        } else {
                            product
                        }
                    };
                    let distances = [&dense, &dense_rounded]
                        .map(|dense| distance(got.clone(), expected(dense)));
                    // Without matrix units the weight is not rounded.
                    let distance = distances[0].min(distances[1]);
                    assert!(
                        distance < BOUND,
                        "{dtype:?} {weight:?} [{n}, {d_in}, {d_out}] {direction:?}, low rank {rank} {with_low}: {distance:.1e}"
                    );
                }
            }
        }
    }
}

/// Sums of products in one launch. The result is rounded to this type.
pub fn joint_products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(16);
    let direction = Direction::Backward;
    for dtype in types(gpu) {
        let bound = if dtype == DType::F16 { 5e-4 } else { 4e-3 };
        for case in JOINT {
            let x = |x| rounded(&powers_of_two(x), dtype, gpu);
            // Kernels without matrix units have these factors in f32, others round them to this type.
            let factor = |x| {
                let [on_gpu, x] = rounded(&powers_of_two(x), dtype, gpu);
                [on_gpu.cast(DType::F32), x]
            };
            let [(low_gpu, on_gpu), (low, on_cpu)] =
                joint_terms(case, direction, &mut rng, [gpu, &cpu], [&x, &factor]);
            assert!(joins(&on_gpu, direction), "{case:?}");
            let got = joint_product(Some(&low_gpu), on_gpu, direction);
            assert_eq!(got.dtype(), dtype);
            let mut sum = None;
            for term in on_cpu {
                let dense = term.weight.dequantize().transpose();
                let product = term.x.matmul(dense);
                let product = match term.low_rank {
                    Some((first, b)) => {
                        let low = low.clone().narrow(1, first, b.dims()[0]);
                        product + low.matmul(b)
                    }
                    None => product,
                };
                sum = Some(sum.map_or(product.clone(), |sum: Tensor<2>| sum + product));
            }
            let distance = distance(got, sum.expect("there are products"));
            assert!(distance < bound, "{dtype:?} {case:?}: {distance:.1e}");
        }
    }
}

/// SwiGLU as part of a product, against SwiGLU behind the same product. The rest is in [`products`].
pub fn gated_products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(14);
    let weight = Weight::Ours(Quantization::Bits8);
    for dtype in types(gpu) {
        // Both round to this type; exponentials may differ in the last bits.
        let bound = if dtype == DType::F16 { 5e-4 } else { 4e-3 };
        let (n, hidden, wide) = (130, 96, 160);
        let [_, up_weight] = weight.on([hidden, wide], &mut rng, [&cpu, gpu]);
        let [_, down] = weight.on([wide, hidden], &mut rng, [&cpu, gpu]);
        let [gate, up, x] = [wide, wide, hidden].map(|width| {
            let x = normal([n, width], 1.0, &mut rng, &cpu);
            on(gpu, &x).cast(dtype)
        });
        let product = |x, weight, direction| packed_product(None, x, weight, None, direction);
        let plain = product(x.clone(), up_weight.clone(), Direction::Forward);
        let gated = swiglu(&gate, &plain);
        let d_output = product(x.clone(), down.clone(), Direction::Backward);
        let (d_gate, d_up) = swiglu_backward(gate.clone(), up.clone(), d_output);
        let (a, b) = gated_product(&gate, x.clone(), up_weight, None);
        let (c, d) = gated_product_backward(gate, up, x, down, None);
        let pairs = [(a, plain), (b, gated), (c, d_gate), (d, d_up)];
        for (i, (got, expected)) in pairs.into_iter().enumerate() {
            assert_eq!(got.dtype(), dtype);
            let distance = distance(got, expected);
            assert!(distance < bound, "{dtype:?} {i}: {distance:.1e}");
        }
    }
}

pub fn attention_and_gradients(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(12);
    for dtype in types(gpu) {
        let bound = if dtype == DType::F16 { 3e-3 } else { 1e-2 };
        let on_matrix_units = |heads| {
            let shape = shape(heads, dtype, gpu);
            shape.is_some_and(|shape| shape.fragment.is_some())
        };
        let cases = segments_and_heads();
        let required = std::env::var_os("LORA_REQUIRE_MATRIX_UNITS").is_some();
        assert!(
            !required || dtype != DType::F16 || on_matrix_units(cases[0].2),
            "LORA_REQUIRE_MATRIX_UNITS is set, and this device has none"
        );
        // Mesa's software driver takes a minute and more to compile these for matrix units: a tree of prefixes with
        // a window, and heads in two chunks.
        let cases = cases.into_iter().enumerate();
        let cases = cases.filter(|(i, case)| !on_matrix_units(case.2) || [3, 4].contains(i));
        for (_, (segments, window, heads)) in cases {
            let n = segments.iter().map(|segment| segment.length).sum();
            let widths =
                [heads.query, heads.key, heads.key, heads.query].map(|count| count * heads.d);
            let [q, k, v, gradient] = widths.map(|width| normal([n, width], 1.5, &mut rng, &cpu));
            // The GPU's attention expects divided queries; the CPU's divides the scores.
            let root = (heads.d as f64).sqrt();
            let inputs = [q.div_scalar(root), k, v, gradient].map(|x| rounded(&x, dtype, gpu));
            let run = |device: &Device| {
                let (dtype, which) = if device == gpu {
                    (dtype, 0)
                } else {
                    (DType::F32, 1)
                };
                let layout = layout(&segments, window, heads, dtype, device);
                let [q, k, v, gradient] = inputs.clone().map(|x| x[which].clone());
                let scale = root * query_scale(&q, heads);
                let (output, saved) = attention(q.mul_scalar(scale), k, v, &layout, heads);
                let [d_q, d_k, d_v] = attention_backward(saved, gradient, &layout, heads);
                [output, d_q.cast(DType::F32).mul_scalar(scale), d_k, d_v]
            };
            let names = ["output", "d_q", "d_k", "d_v"];
            for ((name, got), expected) in names.iter().zip(run(gpu)).zip(run(&cpu)) {
                if n == 1 && (*name == "d_q" || *name == "d_k") {
                    continue;
                }
                let distance = distance(got, expected);
                assert!(
                    distance < bound,
                    "{dtype:?} {segments:?} {heads:?}: {name} {distance:.1e}"
                );
            }
        }
    }
}
