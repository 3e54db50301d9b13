//! Every kernel against the CPU's, on whatever GPU or software driver `wgpu` finds.
//!
//! Bounds: f32 sums of up to 2,000 products in another order differ by some 1e-6 of the result's norm. A tile that is
//! off by one, a missing mask or a wrong scale changes the result by 1e-3 and more.

use burn::tensor::{DType, Device, DeviceKind, Int, Tensor};

use super::{ends_in_gate, joins, packed_product, sixteen_bits};
use crate::{
    AdamWSettings, AttentionLayout, CounterRng, CrossEntropy, Direction, Heads, IntegerWeight,
    JointTerm, LossTerms, LowRankPart, LowRankTerm, Normalized, PlannedAttention, PlannedRotary,
    Quantization, Rotation, SCORES_AT_ONCE, Segment, Targets, Uploads, adamw, adapted_product,
    attention, attention_backward, cross_entropy, gated_product, gated_product_backward,
    joint_product, low_rank_columns, low_rank_gradients, low_rank_gradients_of_norm, normal,
    quantize_data, query_scale, rms_norm, rms_norm_backward, rotate, sums_of_squares, swiglu,
    swiglu_backward,
};
use gpu_kernels::{FEW_ROWS, Fault, inject, set_software_driver};

/// Relative Frobenius distance from the CPU's result.
pub const BOUND: f64 = 5e-6;

/// The GPU, unless there is none and `LORA_REQUIRE_WGPU` is not set.
fn gpu() -> Option<Device> {
    let found = std::panic::catch_unwind(|| {
        #[cfg(feature = "vulkan")]
        let device = Device::vulkan(DeviceKind::DefaultDevice);
        #[cfg(not(feature = "vulkan"))]
        let device = Device::wgpu(DeviceKind::DefaultDevice);
        let _ = Tensor::<1>::zeros([1], &device).into_data();
        device
    });
    match found {
        Ok(device) => Some(device),
        Err(_) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => None,
        Err(_) => panic!("LORA_REQUIRE_WGPU is set, and there is no adapter"),
    }
}

pub fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().try_to_vec().expect("f32")
}

pub fn distance<const D: usize>(got: Tensor<D>, expected: Tensor<D>) -> f64 {
    let (got, expected) = (values(got), values(expected));
    assert_eq!(got.len(), expected.len());
    let pairs = || got.iter().zip(&expected);
    let difference: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let norm: f64 = pairs().map(|(_, b)| f64::from(*b).powi(2)).sum();
    assert!(norm > 0.0, "nothing to compare");
    (difference / norm).sqrt()
}

/// A tensor of the CPU on another device.
pub fn on<const D: usize>(device: &Device, x: &Tensor<D>) -> Tensor<D> {
    Tensor::from_data(x.clone().into_data(), (device, DType::F32))
}

/// The types of activations that the GPU has, and a bound for each: a result in f16 is rounded.
fn types(gpu: &Device) -> Vec<(DType, f64)> {
    let f16 = gpu.supports_dtype(burn::tensor::FloatDType::F16);
    let all = [(DType::F32, BOUND), (DType::F16, 1e-3)];
    all.into_iter().take(1 + usize::from(f16)).collect()
}

/// The lengths of segments and their parents.
type Lengths = &'static [(usize, Option<usize>)];

/// A comparison of some kernels with the CPU, over many shapes. Panics if a result is too far from the CPU's.
type Comparison = fn(&Device);

/// Every comparison, with the faults that it has to notice.
const COMPARISONS: [(&str, Comparison, &[Fault]); 14] = [
    ("products", products, &[Fault::Scale, Fault::Depth]),
    (
        "products with SwiGLU",
        gated_products,
        &[Fault::Slope, Fault::Depth],
    ),
    (
        "products in one launch",
        joint_products,
        &[Fault::Member, Fault::Scale, Fault::Depth],
    ),
    (
        "attention",
        attention_and_gradients,
        &[Fault::Mask, Fault::Window, Fault::Correction],
    ),
    (
        "products in 16 bits",
        sixteen_bits::products,
        &[Fault::Scale, Fault::Depth],
    ),
    (
        "products with SwiGLU in 16 bits",
        sixteen_bits::gated_products,
        &[],
    ),
    (
        "products in one launch in 16 bits",
        sixteen_bits::joint_products,
        &[Fault::Member, Fault::Depth],
    ),
    (
        "attention in 16 bits",
        sixteen_bits::attention_and_gradients,
        &[Fault::Mask, Fault::Window, Fault::Correction],
    ),
    (
        "low-rank products",
        low_rank_products,
        &[Fault::Part, Fault::Gain],
    ),
    ("RMSNorm", norms, &[Fault::Mean]),
    ("RoPE", rotations, &[]),
    ("SwiGLU", gates, &[Fault::Slope]),
    ("cross entropy", cross_entropies, &[Fault::Target]),
    ("AdamW", updates, &[Fault::Squares, Fault::Bias]),
];

// One test: a fault would spoil the kernels of tests beside it.
#[test]
fn kernels_compute_what_the_cpu_computes_and_a_fault_is_noticed() {
    let Some(gpu) = gpu() else {
        return;
    };
    for (name, compare, faults) in COMPARISONS {
        // The kernels for software drivers compute the same on a GPU.
        let has_both = name.starts_with("products") || name.starts_with("attention");
        for software in if has_both {
            &[true, false][..]
        } else {
            &[true]
        } {
            set_software_driver(*software);
            if name.ends_with("16 bits") && sixteen_bits::types(&gpu).is_empty() {
                continue;
            }
            compare(&gpu);
            for fault in faults {
                inject(*fault);
                let noticed = std::panic::catch_unwind(|| compare(&gpu)).is_err();
                inject(Fault::None);
                assert!(noticed, "{name}: {fault:?} was not noticed ({software})");
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Weight {
    Ours(Quantization),
    /// Blocks along d_in, as in GGUF files.
    Gguf,
}

impl Weight {
    /// The same weight on several devices.
    pub fn on(
        self,
        [d_in, d_out]: [usize; 2],
        rng: &mut CounterRng,
        devices: [&Device; 2],
    ) -> [Tensor<2>; 2] {
        let floats: Vec<f32> = (0..d_in * d_out).map(|_| rng.normal() as f32).collect();
        match self {
            Self::Ours(quantization) => devices.map(|device| {
                let quantized = quantize_data(&floats, [d_in, d_out], quantization);
                Tensor::from_data(quantized.expect("can be packed").0, device)
            }),
            Self::Gguf => {
                let integers: Vec<i8> = floats.iter().map(|x| (x * 40.0) as i8).collect();
                let scales = (0..d_in * d_out / 32).map(|i| 0.01 + (i % 7) as f32 / 100.0);
                let weight = IntegerWeight::new(integers, scales.collect(), 32, [d_in, d_out]);
                devices.map(|device| weight.clone().on(device))
            }
        }
    }
}

fn products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(5);
    let ours = Weight::Ours;
    for (weight, n, d_in, d_out, rank) in [
        // One row, few rows, sizes that are no multiples of a tile or of anything.
        (ours(Quantization::Bits8), 1, 64, 32, 1),
        (ours(Quantization::Bits8), 7, 100, 172, 3),
        (ours(Quantization::Bits8), 2, 700, 68, 3),
        (ours(Quantization::Bits4), 1, 1100, 72, 5),
        (ours(Quantization::Bits4), 15, 132, 40, 4),
        (Weight::Gguf, 1, 1056, 33, 2),
        (Weight::Gguf, 3, 64, 20, 1),
        (ours(Quantization::Bits8), 130, 576, 288, 8),
        (ours(Quantization::Bits8), 65, 258, 132, 256),
        (ours(Quantization::Bits8), 33, 2050, 64, 5),
        (ours(Quantization::Bits4), 5, 64, 96, 4),
        (ours(Quantization::Bits4), 70, 100, 200, 2),
        (Weight::Gguf, 9, 96, 50, 4),
        (Weight::Gguf, 129, 224, 131, 16),
    ] {
        let [on_cpu, on_gpu] = weight.on([d_in, d_out], &mut rng, [&cpu, gpu]);
        for direction in [Direction::Forward, Direction::Backward] {
            let (k, m) = direction.inner_and_outer([d_in, d_out]);
            // The inner dimension of the product with Wᵀ is d_out.
            let mut random = |shape| normal(shape, 1.0, &mut rng, &cpu);
            let (x, sum) = (random([n, k]), random([n, m]));
            // A transposed view, as the hidden activations of adapters are.
            let first = n % 3;
            let (low, b) = (random([first + rank + 1, n]), random([rank, m]));
            for (with_sum, with_low) in [(false, false), (true, false), (false, true), (true, true)]
            {
                let product = |device: &Device, weight: &Tensor<2>| {
                    let low = LowRankTerm {
                        low: LowRankPart {
                            all: on(device, &low).transpose(),
                            first,
                            rank,
                        },
                        b: on(device, &b),
                    };
                    let product = if device == &cpu {
                        adapted_product
                    } else {
                        packed_product
                    };
                    product(
                        with_sum.then(|| on(device, &sum)),
                        on(device, &x),
                        weight.clone(),
                        with_low.then_some(low),
                        direction,
                    )
                };
                let distance = distance(product(gpu, &on_gpu), product(&cpu, &on_cpu));
                assert!(
                    distance < BOUND,
                    "{weight:?} [{n}, {d_in}, {d_out}] {direction:?}, sum {with_sum}, low rank {rank} {with_low}: {distance:.1e}"
                );
            }
        }
    }
}

/// The weight, the number of rows, d_in, and d_out and the rank of each product.
pub type JointCase = (Weight, usize, usize, &'static [(usize, usize)]);

/// Sizes that are no multiples of a tile, two and three products, with ranks of 0.
pub const JOINT: [JointCase; 5] = [
    (
        Weight::Ours(Quantization::Bits8),
        130,
        96,
        &[(96, 8), (32, 8), (32, 8)],
    ),
    (
        Weight::Ours(Quantization::Bits8),
        65,
        260,
        &[(160, 3), (96, 0)],
    ),
    (
        Weight::Ours(Quantization::Bits8),
        40,
        72,
        &[(64, 0), (32, 0), (96, 5)],
    ),
    (
        Weight::Ours(Quantization::Bits4),
        33,
        64,
        &[(224, 0), (64, 0)],
    ),
    (Weight::Gguf, 129, 224, &[(131, 40), (64, 1), (7, 2)]),
];

/// The columns of low rank and the products of a case on both devices. `prepared` puts a tensor on both: an `x`, and a
/// factor of low rank.
pub fn joint_terms(
    (weight, n, d_in, sizes): JointCase,
    direction: Direction,
    rng: &mut CounterRng,
    devices: [&Device; 2],
    [prepared, prepared_factor]: [&dyn Fn(Tensor<2>) -> [Tensor<2>; 2]; 2],
) -> [(Tensor<2>, Vec<JointTerm>); 2] {
    let cpu = Device::flex();
    let ranks: usize = sizes.iter().map(|(_, rank)| rank).sum();
    let low = prepared_factor(normal([n, ranks.max(1)], 1.0, rng, &cpu));
    let mut first = 0;
    let mut terms = low.map(|low| (low, Vec::new()));
    for (d_out, rank) in sizes {
        // The products of a sum have outputs of one size.
        let shape = match direction {
            Direction::Backward => [d_in, *d_out],
            Direction::Forward => [*d_out, d_in],
        };
        let weights = weight.on(shape, rng, devices);
        let x = prepared(normal([n, *d_out], 1.0, rng, &cpu));
        // A transposed view, as an adapter's A in the backward pass.
        let b = prepared_factor(normal([d_in, (*rank).max(1)], 1.0, rng, &cpu));
        for (((terms, weight), x), b) in terms.iter_mut().zip(weights).zip(x).zip(b) {
            terms.1.push(JointTerm {
                x,
                weight,
                low_rank: (*rank > 0).then(|| (first, b.transpose())),
            });
        }
        first += rank;
    }
    terms
}

fn joint_products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(15);
    for case in JOINT {
        for direction in [Direction::Forward, Direction::Backward] {
            // GGUF's blocks lie along d_in, whose length is no multiple of them here.
            if direction == Direction::Forward && matches!(case.0, Weight::Gguf) {
                continue;
            }
            let both = |x: Tensor<2>| [on(gpu, &x), x];
            let [(low_gpu, on_gpu), (low, on_cpu)] =
                joint_terms(case, direction, &mut rng, [gpu, &cpu], [&both, &both]);
            assert!(joins(&on_gpu, direction), "{case:?}");
            let got = joint_product(Some(&low_gpu), on_gpu, direction);
            let expected = joint_product(Some(&low), on_cpu, direction);
            let distance = distance(got, expected);
            assert!(distance < BOUND, "{case:?} {direction:?}: {distance:.1e}");
        }
    }
}

fn gated_products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(13);
    let ours = Weight::Ours;
    for (weight, n, hidden, wide, rank) in [
        // Few rows, without a kernel of their own; sizes that are no multiples of a tile.
        (ours(Quantization::Bits8), 3, 64, 32, 2),
        (ours(Quantization::Bits8), 130, 96, 172, 8),
        (ours(Quantization::Bits4), 33, 64, 200, 3),
        (Weight::Gguf, 65, 96, 224, 5),
    ] {
        let [up_cpu, up_gpu] = weight.on([hidden, wide], &mut rng, [&cpu, gpu]);
        let [down_cpu, down_gpu] = weight.on([wide, hidden], &mut rng, [&cpu, gpu]);
        for with_low in [false, true] {
            let mut random = |shape, std| normal(shape, std, &mut rng, &cpu);
            // Gates whose exponentials overflow f32, among others.
            let gate = random([n, wide], 1.0) * random([n, wide], 30.0);
            let [x, up, low] = [hidden, wide, rank].map(|width| random([n, width], 1.0));
            let b = random([rank, wide], 1.0);
            let run = |device: &Device, up_weight: &Tensor<2>, down: &Tensor<2>| {
                let [gate, up, x] = [&gate, &up, &x].map(|x| on(device, x));
                let term = || LowRankTerm {
                    low: LowRankPart::whole(on(device, &low)),
                    b: on(device, &b),
                };
                let term = || with_low.then(term);
                assert_eq!(
                    device == gpu && n >= FEW_ROWS,
                    device == gpu && ends_in_gate(&x, up_weight, Direction::Forward)
                );
                let kept = gate.clone();
                let (a, b) = gated_product(&gate, x.clone(), up_weight.clone(), term());
                let (c, d) = gated_product_backward(gate, up, x, down.clone(), term());
                [a, b, c, d, kept]
            };
            let got = run(gpu, &up_gpu, &down_gpu);
            let expected = run(&cpu, &up_cpu, &down_cpu);
            let names = ["up", "output", "d_gate", "d_up", "gate"];
            for ((name, got), expected) in names.iter().zip(got).zip(expected) {
                let distance = distance(got, expected);
                assert!(
                    distance < BOUND,
                    "{weight:?} [{n}, {hidden}, {wide}], low rank {with_low}: {name} {distance:.1e}"
                );
            }
        }
    }
}

pub fn layout(
    segments: &[Segment],
    window: Option<usize>,
    heads: Heads,
    dtype: DType,
    device: &Device,
) -> AttentionLayout {
    let mut uploads = Uploads::default();
    // Something in front of the tables, so that their places matter.
    let _ = uploads.ints([7, 7, 7]);
    let planned = PlannedAttention::new(
        segments,
        window,
        heads,
        dtype,
        device,
        SCORES_AT_ONCE,
        &mut uploads,
    );
    planned.on_device(&uploads.send(device))
}

/// Batches and heads: one token, one key, odd sizes, prefix trees, many heads per key head, a wide head.
pub fn segments_and_heads() -> Vec<(Vec<Segment>, Option<usize>, Heads)> {
    let heads = |query, key, d| Heads { query, key, d };
    let cases: [(Lengths, Option<usize>, Heads); 9] = [
        (&[(1, None)], None, heads(1, 1, 4)),
        (&[(7, None), (1, None)], None, heads(2, 1, 16)),
        (
            &[
                (33, None),
                (20, Some(0)),
                (5, None),
                (11, Some(0)),
                (40, Some(2)),
            ],
            None,
            heads(6, 2, 20),
        ),
        (
            &[(33, None), (20, Some(0)), (5, None), (50, Some(0))],
            Some(37),
            heads(6, 2, 20),
        ),
        (&[(1, None), (70, None)], None, heads(7, 1, 40)),
        (
            &[(20, None), (5, Some(0)), (130, Some(1)), (3, Some(0))],
            None,
            heads(4, 1, 128),
        ),
        (&[(300, None)], None, heads(4, 4, 64)),
        (&[(200, None)], Some(3), heads(4, 2, 64)),
        (&[(40, None)], None, heads(64, 2, 8)),
    ];
    let segment = |(length, parent): &(usize, Option<usize>)| Segment {
        length: *length,
        parent: *parent,
    };
    let cases = cases.into_iter();
    cases
        .map(|(lengths, window, heads)| (lengths.iter().map(segment).collect(), window, heads))
        .collect()
}

fn attention_and_gradients(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(6);
    for (segments, window, heads) in segments_and_heads() {
        let n = segments.iter().map(|segment| segment.length).sum();
        let widths = [heads.query, heads.key, heads.key, heads.query].map(|count| count * heads.d);
        // Large scores, so that a softmax without its maximum would overflow.
        let [q, k, v, gradient] = widths.map(|width| normal([n, width], 3.0, &mut rng, &cpu));
        let run = |device: &Device| {
            let layout = layout(&segments, window, heads, DType::F32, device);
            let [q, k, v, gradient] = [&q, &k, &v, &gradient].map(|x| on(device, x));
            let scale = query_scale(&q, heads);
            let scaled = |x: Tensor<2>| x.mul_scalar(scale);
            let (output, saved) = attention(scaled(q), k, v, &layout, heads);
            let [d_q, d_k, d_v] = attention_backward(saved, gradient, &layout, heads);
            [output, scaled(d_q), d_k, d_v]
        };
        for ((name, got), expected) in ["output", "d_q", "d_k", "d_v"]
            .iter()
            .zip(run(gpu))
            .zip(run(&cpu))
        {
            if n == 1 && (*name == "d_q" || *name == "d_k") {
                // One key has the weight 1 whatever its score.
                assert!(values(got).iter().all(|x| x.abs() < 1e-5));
                continue;
            }
            let distance = distance(got, expected);
            assert!(
                distance < BOUND,
                "{segments:?} {window:?} {heads:?}: {name} {distance:.1e}"
            );
        }
    }
}

fn norms(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(7);
    for (n, hidden) in [(1, 4), (3, 64), (17, 260), (5, 1028), (2, 66)] {
        let mut random = |rows| normal([rows, hidden], 2.0, &mut rng, &cpu);
        let (x, gain, gradient, sum) = (random(n), random(1), random(n), random(n));
        for (dtype, bound) in types(gpu) {
            let run = |device: &Device| {
                let [x, gain, gradient, sum] = [&x, &gain, &gradient, &sum].map(|x| on(device, x));
                let (output, inverse) = rms_norm(&x, gain.clone(), 1e-5, DType::F32);
                let (d_x, rounded) =
                    rms_norm_backward(&x, inverse, gain, 1e-5, gradient, sum, dtype);
                assert_eq!(rounded.dtype(), dtype);
                [output, d_x, rounded]
            };
            let bounds = [BOUND, BOUND, bound];
            for ((got, expected), bound) in run(gpu).into_iter().zip(run(&cpu)).zip(bounds) {
                let distance = distance(got, expected);
                assert!(distance < bound, "[{n}, {hidden}]: {distance:.1e}");
            }
        }
    }
}

fn rotations(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(8);
    for (n, heads, half) in [(1, 1, 2), (9, 3, 10), (70, 5, 32), (33, 2, 64)] {
        let x = normal([n, heads * 2 * half], 1.0, &mut rng, &cpu);
        let angles: Vec<f32> = (0..n * half).map(|i| i as f32 * 0.37).collect();
        for (rotation, scale) in [(Rotation::Forward, 0.3), (Rotation::Inverse, 1.0)] {
            let run = |device: &Device| {
                let mut uploads = Uploads::default();
                let cos = angles.iter().map(|angle| angle.cos()).collect();
                let sin = angles.iter().map(|angle| angle.sin()).collect();
                let planned = PlannedRotary::new(cos, sin, half, &mut uploads);
                let tables = planned.on_device(&uploads.send(device));
                // The CPU's attention scales the scores, not the queries.
                let at_once = if device == &cpu { 1.0 } else { scale };
                rotate(on(device, &x), &tables, rotation, at_once)
            };
            let distance = distance(run(gpu), run(&cpu).mul_scalar(scale));
            assert!(
                distance < BOUND,
                "{n} {heads} {half} {rotation:?}: {distance:.1e}"
            );
        }
    }
}

fn gates(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(11);
    for (n, width) in [(1, 4), (7, 100), (33, 516), (3, 66)] {
        for (dtype, bound) in types(gpu) {
            // Gates whose exponentials overflow f32, in f32.
            let mut random = |std| normal([n, width], std, &mut rng, &cpu).cast(dtype);
            let (gate, up, gradient) = (random(40.0), random(1.0), random(1.0));
            let run = |device: &Device| {
                let moved = |x| on(device, x).cast(dtype);
                let [gate, up, gradient] = [&gate, &up, &gradient].map(moved);
                let output = swiglu(&gate, &up);
                let kept = gate.clone();
                let (d_gate, d_up) = swiglu_backward(gate, up, gradient);
                [output, d_gate, d_up, kept]
            };
            for (got, expected) in run(gpu).into_iter().zip(run(&cpu)) {
                let distance = distance(got, expected);
                assert!(distance < bound, "[{n}, {width}] {dtype:?}: {distance:.1e}");
            }
        }
    }
}

fn cross_entropies(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(9);
    // Logits whose exponentials overflow f32; a vocabulary in which every token matters, longer than a software driver's
    // loops.
    for (m, vocab, std) in [
        (1, 2, 60.0),
        (7, 90, 60.0),
        (40, 1283, 60.0),
        (2, 300_001, 1.0),
    ] {
        let logits = normal([m, vocab], std, &mut rng, &cpu);
        let values_of = values(logits.clone());
        let best = |row: usize| {
            let row = &values_of[row * vocab..(row + 1) * vocab];
            (0..vocab)
                .max_by(|a, b| row[*a].total_cmp(&row[*b]))
                .unwrap_or(0) as u32
        };
        let ids: Vec<u32> = (0..m)
            .map(|row| {
                if row % 2 == 0 {
                    best(row)
                } else {
                    (row * 31 % vocab) as u32
                }
            })
            .collect();
        for (dtype, bound) in types(gpu) {
            let run = |device: &Device| {
                let targets = ids.iter().map(|id| *id as i32).collect::<Vec<_>>();
                let on_device = Tensor::<1, Int>::from_data(&targets[..], device);
                let targets = Targets {
                    ids: &ids,
                    on_device,
                };
                let logits = on(device, &logits);
                let CrossEntropy { gradient, terms } = cross_entropy(logits, targets, 8.0, dtype);
                let (loss, hits) = match terms {
                    LossTerms::OnHost { loss, hits } => (loss, hits),
                    LossTerms::OnDevice { loss, hits } => {
                        let hits = values(hits).iter().map(|hit| *hit == 1.0).collect();
                        (f64::from(values(loss)[0]), hits)
                    }
                };
                (gradient, loss, hits)
            };
            let (got, expected) = (run(gpu), run(&cpu));
            let distance = distance(got.0, expected.0);
            assert!(distance < bound, "[{m}, {vocab}]: {distance:.1e}");
            let loss = (got.1 - expected.1).abs() / expected.1.abs().max(1.0);
            assert!(loss < 1e-6, "[{m}, {vocab}]: {} {}", got.1, expected.1);
            assert_eq!(got.2, expected.2, "[{m}, {vocab}]");
            assert!(got.2.iter().any(|hit| *hit));
        }
    }
}

fn updates(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(12);
    let settings = AdamWSettings {
        beta_1: 0.8,
        beta_2: 0.95,
        epsilon: 1e-6,
        weight_decay: 0.3,
    };
    for count in [1, 7, 260, 70_000, 70_001] {
        let flat = |x: Tensor<2>| x.reshape([count]);
        let mut random = || flat(normal([1, count], 1.0, &mut rng, &cpu));
        let (parameters, gradients) = (random(), [random(), random(), random()]);
        let run = |device: &Device| {
            let mut now = on(device, &parameters);
            let (mut state, mut kept) = (None, Vec::new());
            for gradient in &gradients {
                let gradient = on(device, gradient);
                let squares = values(sums_of_squares(&gradient));
                let squares: f64 = squares.into_iter().map(f64::from).sum();
                kept.push(Tensor::<1>::from_data([squares as f32], &cpu));
                let updated = adamw(settings, 0.02, 0.1, now.clone(), gradient, state.clone());
                // The parameters before the step and its state keep their values.
                kept.push(now);
                if let Some(state) = state {
                    kept.extend([state.moment_1, state.moment_2]);
                }
                (now, state) = updated;
            }
            let state = state.expect("updated");
            assert_eq!(state.time, gradients.len());
            kept.extend([now, state.moment_1, state.moment_2]);
            kept
        };
        for (i, (got, expected)) in run(gpu).into_iter().zip(run(&cpu)).enumerate() {
            let distance = distance(got, expected);
            assert!(distance < BOUND, "[{count}] {i}: {distance:.1e}");
        }
    }
}

fn low_rank_products(gpu: &Device) {
    let cpu = Device::flex();
    let mut rng = CounterRng::new(10);
    let cases: [(usize, &[(usize, usize)]); 5] = [
        (1, &[(4, 1)]),
        (7, &[(100, 3), (20, 8)]),
        (33, &[(64, 8), (32, 8), (32, 8)]),
        (130, &[(260, 17), (132, 1), (68, 64)]),
        (40, &[(64, 256)]),
    ];
    for (n, layers) in cases {
        let mut random = |shape| normal(shape, 1.0, &mut rng, &cpu);
        let wide: Vec<_> = layers.iter().map(|layer| random([n, layer.0])).collect();
        let factors: Vec<_> = layers
            .iter()
            .map(|layer| random([layer.0, layer.1]))
            .collect();
        let ranks: Vec<usize> = layers.iter().map(|layer| layer.1).collect();
        let scales: Vec<f64> = (0..layers.len()).map(|i| 0.5 + i as f64).collect();
        let on_gpu = |x: &[Tensor<2>]| x.iter().map(|x| on(gpu, x)).collect::<Vec<_>>();
        let columns = wide.iter().zip(&factors).zip(&scales);
        let columns = columns.map(|((x, f), scale)| x.clone().matmul(f.clone()).mul_scalar(*scale));
        let expected = Tensor::cat(columns.collect(), 1);
        let of_transposed: Vec<_> = factors.iter().map(|f| f.clone().transpose()).collect();
        for (transposed, factors) in [(false, &factors), (true, &of_transposed)] {
            // Copied to the GPU as they lie, a transposed view among them.
            let columns = low_rank_columns(&on_gpu(&wide), &on_gpu(factors), transposed, &scales);
            let distance = distance(columns.expect("a kernel"), expected.clone());
            assert!(
                distance < BOUND,
                "{n} {layers:?} {transposed}: {distance:.1e}"
            );
        }
        // The gradients of layers behind a norm, whose output is not computed again.
        let x = wide[0].clone().mul_scalar(3.0);
        let gain = normal([1, layers[0].0], 1.0, &mut rng, &cpu);
        let (output, _) = rms_norm(&x, gain.clone(), 1e-5, DType::F32);
        let (_, inverse) = rms_norm(&on(gpu, &x), on(gpu, &gain), 1e-5, DType::F32);
        let normalized = Normalized {
            x: on(gpu, &x),
            inverse,
            gain: on(gpu, &gain),
        };
        let got = low_rank_gradients_of_norm(&on(gpu, &expected), &normalized, &ranks);
        let mut first = 0;
        for (got, rank) in got.expect("a kernel").into_iter().zip(&ranks) {
            let low = expected.clone().narrow(1, first, *rank);
            first += rank;
            let distance = distance(got, output.clone().transpose().matmul(low));
            assert!(
                distance < BOUND,
                "{n} {layers:?}, of a norm: {distance:.1e}"
            );
        }
        for transposed in [false, true] {
            let low = on(gpu, &expected);
            let got = low_rank_gradients(&low, &on_gpu(&wide), &ranks, transposed);
            let mut first = 0;
            for ((got, wide), rank) in got.expect("a kernel").into_iter().zip(&wide).zip(&ranks) {
                let low = expected.clone().narrow(1, first, *rank);
                first += rank;
                let product = low.transpose().matmul(wide.clone());
                let product = if transposed {
                    product.transpose()
                } else {
                    product
                };
                assert_eq!(got.dims(), product.dims());
                let distance = distance(got, product);
                assert!(
                    distance < BOUND,
                    "{n} {layers:?} {transposed}: {distance:.1e}"
                );
            }
        }
    }
}
