//! The kernels that are compiled, at the settings of two models.
//!
//! **To add a kernel**, add an entry to [`all`]: a name with the settings that change its code, and a call of the
//! operation in `GpuOps` with tensors of the right shape and type ([`Tensors`] makes them; no memory is behind them).
//! Every kernel of ours that the call launches gets a line of the table, and is compiled for every target. Where the
//! device's properties decide which kernel is launched, the targets' properties do (`targets.rs`).

use burn::backend::ops::QTensorOps as _;
use burn::tensor::DType;
use burn::tensor::Shape;
use burn::tensor::quantization::{
    QParamTensor, QParams, QuantScheme, QuantStore, QuantValue, ScaleDtype,
};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::server::{MemoryLayoutDescriptor, MemoryLayoutStrategy};
use cubecl::zspace::metadata::Metadata;
use cubecl_server::client::Client;
use gpu_kernels::{AdamWNumbers, AttentionShape, GpuOps, Group, Joint, Terms, TiledAttention};

/// A call whose kernels are compiled.
pub struct Case {
    /// The settings that change the code, as the table shows them.
    pub settings: &'static str,
    /// The call.
    pub launch: fn(&Tensors),
}

/// The sizes that a kernel's code may depend on.
struct Model {
    hidden: usize,
    mlp: usize,
    key_heads: usize,
    group: usize,
    head: usize,
    vocabulary: usize,
}

/// Llama 3.1 8B.
const LLAMA: Model = Model {
    hidden: 4096,
    mlp: 14_336,
    key_heads: 8,
    group: 4,
    head: 128,
    vocabulary: 128_256,
};

/// SmolLM2 135M.
const SMOL: Model = Model {
    hidden: 576,
    mlp: 1536,
    key_heads: 3,
    group: 3,
    head: 64,
    vocabulary: 49_152,
};

/// Tokens of a batch.
const TOKENS: usize = 2048;
/// Integers that share a scale.
const BLOCK: u8 = 32;
/// The adapters' rank.
const RANK: usize = 8;

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;

const fn case(settings: &'static str, launch: fn(&Tensors)) -> Case {
    Case { settings, launch }
}

/// Every kernel that is compiled.
pub fn all() -> Vec<Case> {
    vec![
        // Products: bits, direction, type of x, terms. GGUF's blocks lie along the inner dimension, ours along columns.
        case("8 bit, x·W, f32, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q8S), false, F32)
        }),
        case("8 bit, x·W, bf16, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q8S), false, BF16)
        }),
        case("8 bit, G·Wᵀ, f32, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q8S), true, F32)
        }),
        case("8 bit, G·Wᵀ, bf16, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q8S), true, BF16)
        }),
        case("4 bit, x·W, f32, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q4S), false, F32)
        }),
        case("4 bit, x·W, bf16, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q4S), false, BF16)
        }),
        case("4 bit, G·Wᵀ, f32, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q4S), true, F32)
        }),
        case("4 bit, G·Wᵀ, bf16, low rank", |on| {
            product(on, Weight::Ours(QuantValue::Q4S), true, BF16)
        }),
        case("8 bit, x·W, bf16, low rank, 64 rows", |on| {
            product_of(on, Weight::Ours(QuantValue::Q8S), false, BF16, 64)
        }),
        case("8 bit, x·W, bf16, low rank, 1 row", |on| {
            product_of(on, Weight::Ours(QuantValue::Q8S), false, BF16, 1)
        }),
        case("8 bit of GGUF, x·W, f32, low rank", |on| {
            product(on, Weight::Gguf, false, F32)
        }),
        case("8 bit of GGUF, G·Wᵀ, f32, low rank", |on| {
            product(on, Weight::Gguf, true, F32)
        }),
        case("three of 8 bit, G·Wᵀ, f32, low rank", |on| {
            joint_product(on, F32)
        }),
        case("three of 8 bit, G·Wᵀ, bf16, low rank", |on| {
            joint_product(on, BF16)
        }),
        case("8 bit, SwiGLU, f32, low rank", |on| gated_products(on, F32)),
        case("8 bit, SwiGLU, bf16, low rank", |on| {
            gated_products(on, BF16)
        }),
        // Attention: width of a head, query heads per key head, type.
        case("head 128, group 4, f32", |on| attention(on, &LLAMA, F32)),
        case("head 128, group 4, bf16", |on| attention(on, &LLAMA, BF16)),
        case("head 64, group 3, f32", |on| attention(on, &SMOL, F32)),
        case("head 64, group 3, bf16", |on| attention(on, &SMOL, BF16)),
        case("head 128, group 4, bf16, window", |on| {
            windowed_attention(on, &LLAMA, BF16, true)
        }),
        // Adapters: types of the wide factor and of the small one.
        case("r 8, f32", |on| low_rank(on, F32)),
        case("r 8, bf16", |on| low_rank(on, BF16)),
        // A workgroup per row.
        case("f32", |on| norms(on, F32)),
        case("bf16", |on| norms(on, BF16)),
        case("head 128, f32", |on| rotation(on, &LLAMA, F32)),
        case("head 128, bf16", |on| rotation(on, &LLAMA, BF16)),
        case("head 64, f32", |on| rotation(on, &SMOL, F32)),
        case("f32", |on| cross_entropy(on, F32)),
        case("to bf16", |on| cross_entropy(on, BF16)),
        case("f32", |on| gates(on, F32)),
        case("bf16", |on| gates(on, BF16)),
        case("f32", adamw),
    ]
}

enum Weight {
    Ours(QuantValue),
    Gguf,
}

fn product(on: &Tensors, weight: Weight, transposed: bool, dtype: DType) {
    product_of(on, weight, transposed, dtype, TOKENS);
}

fn product_of(on: &Tensors, weight: Weight, transposed: bool, dtype: DType, rows: usize) {
    let (d_in, d_out) = (LLAMA.hidden, LLAMA.mlp);
    let (k, m) = if transposed {
        (d_out, d_in)
    } else {
        (d_in, d_out)
    };
    let weight = match weight {
        Weight::Ours(value) => on.quantized([d_in, d_out], value),
        Weight::Gguf => on.quantized_along_inputs([d_in, d_out]),
    };
    let terms = Terms {
        transposed,
        sum: true,
        low: Some((0, RANK)),
        dtype,
    };
    CubeBackend::packed_product(
        on.floats([rows, k], dtype),
        weight,
        on.floats([rows, m], dtype),
        on.floats([rows, RANK], F32),
        on.floats([RANK, m], F32),
        terms,
    );
}

/// The gradient of the input of q, k and v.
fn joint_product(on: &Tensors, dtype: DType) {
    let [q, kv] = [LLAMA.group, 1].map(|heads| heads * LLAMA.key_heads * LLAMA.head);
    let weight = |d_out| on.quantized([LLAMA.hidden, d_out], QuantValue::Q8S);
    let gradient = |d_out| on.floats([TOKENS, d_out], dtype);
    let a = || on.floats([RANK, LLAMA.hidden], F32);
    CubeBackend::joint_product(
        gradient(q),
        gradient(kv),
        gradient(kv),
        weight(q),
        weight(kv),
        weight(kv),
        on.floats([TOKENS, 3 * RANK], F32),
        a(),
        a(),
        a(),
        Joint {
            members: 3,
            transposed: true,
            low: [Some((0, RANK)), Some((RANK, RANK)), Some((2 * RANK, RANK))],
            dtype,
        },
    );
}

/// SwiGLU behind up's product, and its backward pass behind that of down_proj.
fn gated_products(on: &Tensors, dtype: DType) {
    let (hidden, mlp) = (LLAMA.hidden, LLAMA.mlp);
    let terms = |transposed| Terms {
        transposed,
        sum: false,
        low: Some((0, RANK)),
        dtype,
    };
    let x = || on.floats([TOKENS, hidden], dtype);
    let wide = || on.floats([TOKENS, mlp], dtype);
    let (low, b) = (
        || on.floats([TOKENS, RANK], F32),
        || on.floats([RANK, mlp], F32),
    );
    let up = on.quantized([hidden, mlp], QuantValue::Q8S);
    CubeBackend::gated_product(x(), up, wide(), low(), b(), terms(false));
    let down = on.quantized([mlp, hidden], QuantValue::Q8S);
    CubeBackend::gated_product_backward(x(), down, wide(), wide(), low(), b(), terms(true));
}

fn attention(on: &Tensors, model: &Model, dtype: DType) {
    windowed_attention(on, model, dtype, false);
}

fn windowed_attention(on: &Tensors, model: &Model, dtype: DType, window: bool) {
    let heads = model.key_heads * model.group;
    let properties = on.client.properties();
    let Some(shape) = AttentionShape::of(properties, dtype, heads, model.key_heads, model.head)
    else {
        unreachable!("both models' heads fit")
    };
    let (wide, narrow) = (heads * model.head, model.key_heads * model.head);
    let tiled = TiledAttention {
        shape: shape.with_window(window),
        spans: 0,
        keys_of: 2 * TOKENS,
        queries_of: 4 * TOKENS,
    };
    let queries = || on.floats([TOKENS, wide], dtype);
    let keys = || on.floats([TOKENS, narrow], dtype);
    let log_sums = on.floats([TOKENS, heads], F32);
    CubeBackend::tiled_attention(queries(), keys(), keys(), on.ints(8 * TOKENS), 0, tiled);
    CubeBackend::tiled_attention_backward(
        queries(),
        keys(),
        keys(),
        queries(),
        log_sums,
        queries(),
        on.ints(8 * TOKENS),
        0,
        tiled,
    );
}

fn low_rank(on: &Tensors, dtype: DType) {
    let group = Group {
        ranks: [RANK; 3],
        scales: [2.0; 3],
        transposed: false,
        dtype: F32,
    };
    let wide = || on.floats([TOKENS, LLAMA.hidden], dtype);
    let factor = || on.floats([LLAMA.hidden, RANK], F32);
    CubeBackend::low_rank_columns(wide(), wide(), wide(), factor(), factor(), factor(), group);
    let low = on.floats([TOKENS, 3 * RANK], F32);
    let (inverse, gain) = (
        on.floats([TOKENS, 1], F32),
        on.floats([1, LLAMA.hidden], F32),
    );
    for normed in [false, true] {
        let (low, inverse, gain) = (low.clone(), inverse.clone(), gain.clone());
        CubeBackend::low_rank_gradients(low, wide(), wide(), wide(), inverse, gain, normed, group);
    }
}

fn norms(on: &Tensors, dtype: DType) {
    let rows = || on.floats([TOKENS, LLAMA.hidden], dtype);
    let gain = || on.floats([1, LLAMA.hidden], F32);
    CubeBackend::rms_norm_rows(rows(), gain(), 1e-5, dtype);
    let inverse = on.floats([TOKENS, 1], F32);
    CubeBackend::rms_norm_rows_backward(rows(), inverse, gain(), rows(), rows(), None);
}

fn rotation(on: &Tensors, model: &Model, dtype: DType) {
    let x = on.floats([TOKENS, model.group * model.key_heads * model.head], dtype);
    let angles = || on.floats([TOKENS, model.head / 2], F32);
    CubeBackend::rotate_heads(x, angles(), angles(), 1.0, 1.0);
}

fn cross_entropy(on: &Tensors, dtype: DType) {
    let logits = on.floats([TOKENS, LLAMA.vocabulary], F32);
    CubeBackend::cross_entropy_rows(logits, on.ints(TOKENS), 1.0, dtype);
}

fn gates(on: &Tensors, dtype: DType) {
    let wide = || on.floats([TOKENS, LLAMA.mlp], dtype);
    CubeBackend::swiglu_rows(wide(), wide());
    CubeBackend::swiglu_rows_backward(wide(), wide(), wide());
}

fn adamw(on: &Tensors) {
    let values = || on.floats([4096], F32);
    CubeBackend::partial_squares(values());
    let numbers = AdamWNumbers {
        factor: 1.0,
        betas: [0.9, 0.999],
        epsilon: 1e-8,
        corrections: [1.0; 2],
        kept: 1.0,
        rate: 1e-4,
    };
    CubeBackend::adamw_update(values(), values(), values(), values(), numbers);
}

/// Makes tensors that only describe themselves.
pub struct Tensors {
    /// The device's client.
    pub client: Client,
}

impl Tensors {
    /// Floats, contiguous.
    pub fn floats<const D: usize>(&self, shape: [usize; D], dtype: DType) -> CubeTensor {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let device = CubeDevice::Cuda(Default::default());
        let handle = self.client.empty(bytes);
        CubeTensor::new_contiguous(
            self.client.clone(),
            device,
            Shape::from(shape),
            handle,
            dtype,
        )
    }

    /// 32-bit integers.
    pub fn ints(&self, length: usize) -> CubeTensor {
        self.floats([length], DType::I32)
    }

    /// A weight `[d_in, d_out]` in our layout: blocks along columns.
    pub fn quantized(&self, shape: [usize; 2], value: QuantValue) -> CubeTensor {
        let scheme = QuantScheme::default()
            .with_value(value)
            .with_store(QuantStore::PackedU32(0))
            .per_block([BLOCK], ScaleDtype::F32);
        let strategy = MemoryLayoutStrategy::Optimized;
        let words = Shape::from([shape[0], shape[1] / scheme.num_quants()]);
        let scales = Shape::from([shape[0], shape[1] / usize::from(BLOCK)]);
        let mut layouts = self.client.empty_tensors(vec![
            MemoryLayoutDescriptor::new(strategy, words, size_of::<u32>()),
            MemoryLayoutDescriptor::new(strategy, scales.clone(), size_of::<f32>()),
        ]);
        let of_scales = layouts.remove(1);
        let of_words = layouts.remove(0);
        let scales = QParamTensor {
            offset_start: of_scales.memory.offset_start.unwrap_or(0) as usize,
            offset_end: of_scales.memory.offset_end.unwrap_or(0) as usize,
            metadata: Metadata::new(scales, of_scales.strides),
            dtype: F32,
        };
        CubeTensor::new_quantized(
            self.client.clone(),
            of_words.memory,
            Shape::from(shape),
            CubeDevice::Cuda(Default::default()),
            of_words.strides,
            DType::QFloat(scheme),
            QParams {
                scales,
                global: None,
            },
        )
    }

    /// A weight `[d_in, d_out]` in GGUF's layout: blocks along the inner dimension, a transposed view.
    pub fn quantized_along_inputs(&self, [d_in, d_out]: [usize; 2]) -> CubeTensor {
        CubeBackend::q_swap_dims(self.quantized([d_out, d_in], QuantValue::Q8S), 0, 1)
    }
}
