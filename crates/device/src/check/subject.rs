//! The layer that devices are compared on, held on the host so that every device gets the same.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::quantization::QuantStore;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use kernels::{CounterRng, compact, quantize_data};
use llama_burn::{DecoderLayer, LinearSpec, LlamaConfig, PackedTokens, RmsNorm};
use lora_core::{LoraLinear, Method};
use rayon::prelude::*;

use super::{CheckOptions, tokens_at_most};

/// Weights of a layer that is made for a check; that of an 8B model has 218 million.
const WEIGHTS: usize = 256 << 20;

/// As [`WEIGHTS`] for a driver that computes on the CPU.
const WEIGHTS_ON_SOFTWARE: usize = 2 << 20;

/// A decoder layer on the host.
pub struct Subject {
    /// The shapes.
    pub config: LlamaConfig,
    /// In the order of [`LlamaConfig::layer_norms`].
    norms: Vec<Vec<f32>>,
    linears: Vec<HostLinear>,
    /// The sliding window of the layer.
    window: Option<usize>,
}

struct HostLinear {
    weight: TensorData,
    bias: Option<Vec<f32>>,
    adapter: Option<HostAdapter>,
}

struct HostAdapter {
    a: TensorData,
    b: TensorData,
    scale: f64,
    method: Method,
    vectors: Vec<TensorData>,
}

/// Seeded numbers around 0 with this deviation, the same on every machine and fast to generate:
/// sums of two uniform numbers.
pub fn numbers(seed: u64, count: usize, deviation: f64) -> Vec<f32> {
    const PIECE: usize = 1 << 14;
    let root = CounterRng::new(seed);
    let mut values = vec![0f32; count];
    let pieces = values.par_chunks_mut(PIECE).enumerate();
    pieces.for_each(|(index, piece)| {
        let mut rng = root.fork(index as u64);
        // The variance of a sum of two is 1/6.
        let scale = deviation * 6f64.sqrt();
        for value in piece {
            let two = (rng.next_u64() >> 32) as f64 + (rng.next_u64() >> 32) as f64;
            *value = ((two / 4_294_967_296.0 - 1.0) * scale) as f32;
        }
    });
    values
}

impl Subject {
    /// A layer of a model's shapes, and sequences for it, two of which share a prefix.
    pub fn made(options: &CheckOptions, is_software: bool) -> (Self, PackedTokens) {
        let config = bounded(options.model, is_software);
        let names = options.lora.selector().ok();
        let r = options.lora.r;
        let linears = config.layer_linears();
        // Adapters where the run has them in some layer, else everywhere.
        let adapted = |name: &str| {
            let in_layer = |index| format!("model.layers.{index}.{name}");
            let in_some = |selector: &lora_core::ModuleSelector| {
                (0..options.model.num_hidden_layers).any(|index| selector.matches(&in_layer(index)))
            };
            names.as_ref().is_none_or(in_some)
        };
        let linear = |(index, linear): (usize, &LinearSpec)| {
            let LinearSpec {
                name,
                d_in,
                d_out,
                bias,
            } = linear;
            let seed = 100 + 10 * index as u64;
            // So that outputs are as long as inputs, roughly as in trained layers.
            let values = numbers(seed, d_in * d_out, (*d_in as f64).powf(-0.5));
            let weight = match quantize_data(&values, [*d_in, *d_out], options.quantization) {
                Some((data, _)) => data,
                None => rounded(values, [*d_in, *d_out], options.dtype),
            };
            // A quarter of the weight's output: with queries and keys much longer than trained
            // ones, the softmax would select a single key and amplify every earlier rounding.
            let deviation = 0.25 / (options.lora.scale() * (r as f64).sqrt());
            let adapter = adapted(name).then(|| HostAdapter {
                a: TensorData::new(
                    numbers(seed + 1, d_in * r, (*d_in as f64).powf(-0.5)),
                    [*d_in, r],
                ),
                b: TensorData::new(numbers(seed + 2, r * d_out, deviation), [r, *d_out]),
                scale: options.lora.scale(),
                method: Method::default(),
                vectors: Vec::new(),
            });
            HostLinear {
                weight,
                bias: bias.then(|| numbers(seed + 3, *d_out, 0.1)),
                adapter,
            }
        };
        let norm = |(seed, width)| {
            let around_one = numbers(seed, width, 0.2).into_iter();
            around_one.map(|x| 1.0 + x).collect()
        };
        let norms = config.layer_norms().into_iter();
        let subject = Self {
            norms: (1..).zip(norms.map(|norm| norm.width)).map(norm).collect(),
            linears: linears.iter().enumerate().map(linear).collect(),
            // The last layers have the windows where not all have them.
            window: config.window(config.num_hidden_layers - 1),
            config,
        };
        let most = tokens_at_most(is_software);
        (subject, rows(options.longest_row.clamp(1, most)))
    }

    /// A layer of a model as it is now. Quantized weights stay quantized, except those with blocks
    /// along the input dimension (from GGUF), which the device dequantizes first.
    ///
    /// # Errors
    ///
    /// If the device does not return its tensors.
    pub fn of(layer: &DecoderLayer, config: &LlamaConfig) -> Result<Self, String> {
        let norm = |(_, norm): (_, &RmsNorm)| floats(data(norm.weight.val())?);
        let linear = |(_, linear): &(_, &LoraLinear)| {
            let bias = linear.bias.as_ref();
            let adapter = linear.adapter().map(|adapter| {
                let [a, b] = adapter.shared().unwrap_or_else(|| adapter.matrices());
                let vectors = adapter.vectors().into_iter();
                Ok::<_, String>(HostAdapter {
                    a: data(a)?,
                    b: data(b)?,
                    scale: adapter.scale(),
                    method: adapter.method(),
                    vectors: vectors
                        .map(|vector| data(vector.val()))
                        .collect::<Result<_, _>>()?,
                })
            });
            Ok::<_, String>(HostLinear {
                weight: weight(linear)?,
                bias: bias
                    .map(|bias| data(bias.val()).and_then(floats))
                    .transpose()?,
                adapter: adapter.transpose()?,
            })
        };
        Ok(Self {
            config: config.clone(),
            norms: layer.norms().map(norm).collect::<Result<_, _>>()?,
            window: layer.self_attn.sliding_window,
            linears: layer
                .linears()
                .iter()
                .map(linear)
                .collect::<Result<_, _>>()?,
        })
    }

    /// The layer on a device that computes in `dtype`, detached from any autodiff graph.
    pub fn on(&self, device: &Device, dtype: FloatDType) -> DecoderLayer {
        let float: DType = dtype.into();
        let norm = |values: &Vec<f32>| RmsNorm {
            weight: frozen(place(
                TensorData::new(values.clone(), [values.len()]),
                DType::F32,
                device,
            )),
            eps: self.config.rms_norm_eps,
        };
        let linear = |index: usize| {
            let host = &self.linears[index];
            let weight = host.weight.clone();
            let weight = match weight.dtype() {
                DType::QFloat(_) => compact(Tensor::from_data(weight, device)),
                _ => place(weight, float, device),
            };
            let bias = host.bias.as_ref().map(|values| {
                let data = TensorData::new(values.clone(), [values.len()]);
                frozen(place::<1>(data, float, device))
            });
            let linear = LoraLinear::frozen(Linear {
                weight: frozen(weight),
                bias,
            });
            let Some(adapter) = &host.adapter else {
                return linear;
            };
            let factor = |data: &TensorData| place::<2>(data.clone(), DType::F32, device);
            let matrices = [factor(&adapter.a), factor(&adapter.b)];
            let vectors = adapter.vectors.iter().map(factor).collect();
            let (method, scale) = (adapter.method, adapter.scale);
            let unadapted = linear.clone();
            let adapted = unadapted.with_adapter_of(method, matrices, scale, Some(vectors));
            // The shapes come from the weight itself.
            adapted.unwrap_or(linear)
        };
        let norms = self.norms.iter().map(norm).collect();
        let linears = (0..self.linears.len()).map(linear).collect();
        let mut layer = DecoderLayer::from_parts(&self.config, 0, norms, linears);
        layer.self_attn.sliding_window = self.window;
        layer
    }
}

/// The shapes, with a narrower feed-forward block if the layer has more weights than a check uses.
fn bounded(model: &LlamaConfig, is_software: bool) -> LlamaConfig {
    let most = if is_software {
        WEIGHTS_ON_SOFTWARE
    } else {
        WEIGHTS
    };
    let weights = |model: &LlamaConfig| -> usize {
        let linears = model.layer_linears();
        linears.iter().map(LinearSpec::elements).sum()
    };
    let mut config = model.clone();
    // Whole blocks of every quantization stay whole.
    while weights(&config) > most && config.intermediate_size >= 2 * config.hidden_size.max(64) {
        config.intermediate_size = (config.intermediate_size / 2).next_multiple_of(32);
    }
    config
}

/// Sequences of at most `longest` tokens in total: a long one, one that shares its prefix, and a
/// short separate one.
fn rows(longest: usize) -> PackedTokens {
    let first: Vec<u32> = (0..longest.div_ceil(2) as u32).collect();
    let second: Vec<u32> = (0..longest as u32 / 4)
        .chain(1000..1000 + longest as u32 / 8)
        .collect();
    let third: Vec<u32> = (2000..2000 + longest as u32 / 5).collect();
    let rows = [&first[..], &second, &third];
    let rows: Vec<&[u32]> = rows.into_iter().filter(|row| !row.is_empty()).collect();
    PackedTokens::sharing_prefixes(&rows, 2).0
}

/// The weight as it is stored.
fn weight(linear: &LoraLinear) -> Result<TensorData, String> {
    let weight = linear.weight.base().without_autodiff();
    match weight.dtype() {
        // Packed along another dimension than the one that is read: a view of what GGUF holds.
        DType::QFloat(scheme) if !matches!(scheme.store, QuantStore::PackedU32(0)) => {
            data(linear.dense_base())
        }
        _ => data(weight),
    }
}

/// Values rounded to a type, in f32.
pub fn rounded(values: Vec<f32>, shape: [usize; 2], dtype: FloatDType) -> TensorData {
    let data = TensorData::new(values, shape);
    data.convert_dtype(dtype.into()).convert::<f32>()
}

fn data<const D: usize>(tensor: Tensor<D>) -> Result<TensorData, String> {
    let tensor = tensor.without_autodiff();
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    Ok(match data.dtype() {
        DType::QFloat(_) => data,
        _ => data.convert::<f32>(),
    })
}

fn floats(data: TensorData) -> Result<Vec<f32>, String> {
    data.try_to_vec::<f32>()
        .map_err(|error| format!("{error:?}"))
}

fn place<const D: usize>(data: TensorData, dtype: DType, device: &Device) -> Tensor<D> {
    Tensor::from_data(data, (device, dtype))
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(Default::default(), tensor).set_require_grad(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_deviation_and_are_the_same_again() {
        let values = numbers(3, 100_000, 0.5);
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / 1e5;
        let square = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.01 && (square.sqrt() - 0.5).abs() < 0.01);
        assert_eq!(numbers(3, 100_000, 0.5), values);
        assert_ne!(numbers(4, 100, 0.5)[..], values[..100]);
    }

    #[test]
    fn rows_share_a_beginning_and_keep_to_their_number() {
        for longest in [1, 2, 24, 256] {
            let packed = rows(longest);
            assert!((1..=longest).contains(&packed.ids.len()), "{longest}");
        }
        let shared = rows(256);
        assert!(
            shared
                .segments
                .iter()
                .any(|segment| segment.parent.is_some())
        );
    }
}
