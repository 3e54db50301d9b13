//! A model of a shape without its weights, for speed and memory, which do not depend on the values.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use kernels::{compact, quantize_data, widens_tables};
use llama_burn::{DecoderLayer, Llama, LlamaConfig, LoadError, LoadOptions, RmsNorm, VocabTable};

use super::protocol::WorkerSpec;
use device::ModelLoader;

/// The model of a contender: that of its files, or one of random weights.
///
/// # Errors
///
/// What is wrong with the files.
pub(super) fn load(spec: &WorkerSpec, loader: &ModelLoader) -> Result<Llama, LoadError> {
    if spec.random_weights {
        let (options, device) = (loader.load_options(), loader.device());
        return Ok(random(&loader.config, options, &device));
    }
    loader.load(|_| {})
}

/// A model with random weights, quantized while it is made: every decoder layer has memory of its
/// own and the same numbers, so that only one layer ever exists in f32 and the numbers are drawn
/// once.
///
/// Its losses are meaningless.
fn random(config: &LlamaConfig, options: LoadOptions, device: &Device) -> Llama {
    let host = Device::flex();
    let one_layer = LlamaConfig {
        vocab_size: 1,
        num_hidden_layers: 1,
        tie_word_embeddings: true,
        ..config.clone()
    };
    let drawn = Llama::random(&one_layer, 1, &host).layers.remove(0);
    let weights = packed_weights(&drawn, options);
    let layers = (0..config.num_hidden_layers).map(|_| placed(&drawn, &weights, options, device));
    let layers = layers.collect();
    drop((drawn, weights));

    let tables = LlamaConfig {
        num_hidden_layers: 0,
        ..config.clone()
    };
    // The head of an untied model is drawn with the embedding, so that one more vocabulary table is
    // on the host.
    let drawn = Llama::random(&tables, 2, &host);
    // As in `llama_burn::load`: on the CPU in the 16 bits of a file.
    let keeps = widens_tables(device) && options.dtype == DType::F32 && config.weight_bytes == 2;
    let dtype = if keeps { DType::BF16 } else { options.dtype };
    let table = |drawn: VocabTable| vocab_table(drawn, dtype, device);
    Llama {
        embed_tokens: table(drawn.embed_tokens),
        layers,
        norm: norm(&drawn.norm, device),
        lm_head: drawn.lm_head.map(table),
        quantized_lm_head: Vec::new(),
        lm_head_adapter: None,
        embed_rows: None,
        head_rows: None,
        config: config.clone(),
    }
}

/// The seven weights of a layer as they are stored.
fn packed_weights(layer: &DecoderLayer, options: LoadOptions) -> Vec<TensorData> {
    let linears = layer.linears().into_iter();
    let packed = linears.map(|(_, linear)| {
        let shape = linear.dims();
        let data = linear.weight.base().into_data();
        match data.as_slice::<f32>() {
            Ok(values) => match quantize_data(values, shape, options.quantization) {
                Some((packed, _)) => packed,
                None => data,
            },
            // The host's backend returns the given type: f32.
            Err(_) => data,
        }
    });
    packed.collect()
}

/// The layer with these weights on `device`.
fn placed(
    drawn: &DecoderLayer,
    weights: &[TensorData],
    options: LoadOptions,
    device: &Device,
) -> DecoderLayer {
    let mut layer = drawn.clone();
    for ((_, linear), data) in layer.linears_mut().zip(weights) {
        let dtype = match data.dtype() {
            DType::QFloat(_) => None,
            _ => Some(options.dtype),
        };
        let weight = tensor::<2>(data.clone(), dtype, device);
        linear.weight = frozen(match dtype {
            Some(_) => weight,
            None => compact(weight),
        });
        linear.bias = linear
            .bias
            .take()
            .map(|bias| parameter(bias.val().into_data(), Some(options.dtype), device));
    }
    for ((_, placed), (_, drawn)) in layer.norms_mut().zip(drawn.norms()) {
        *placed = norm(drawn, device);
    }
    layer
}

fn norm(drawn: &RmsNorm, device: &Device) -> RmsNorm {
    RmsNorm {
        weight: parameter(drawn.weight.val().into_data(), Some(DType::F32), device),
        eps: drawn.eps,
    }
}

/// The table in shards of the size they were drawn with, one shard at a time.
fn vocab_table(drawn: VocabTable, dtype: DType, device: &Device) -> VocabTable {
    let rows_per_piece = drawn.rows_per_piece;
    let pieces = drawn.pieces.into_iter();
    let pieces = pieces.map(|piece| parameter(piece.val().into_data(), Some(dtype), device));
    VocabTable {
        pieces: pieces.collect(),
        rows_per_piece,
        compute: None,
    }
}

fn parameter<const D: usize>(
    data: TensorData,
    dtype: Option<DType>,
    device: &Device,
) -> Param<Tensor<D>> {
    frozen(tensor(data, dtype, device))
}

fn tensor<const D: usize>(data: TensorData, dtype: Option<DType>, device: &Device) -> Tensor<D> {
    device.memory_persistent_allocations(data, |data| match dtype {
        Some(dtype) => Tensor::from_data(data, (device, dtype)),
        None => Tensor::from_data(data, device),
    })
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(Default::default(), tensor).set_require_grad(false)
}
