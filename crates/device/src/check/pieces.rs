//! The operations of a decoder layer, each run on its own on one device.

use burn::module::Param;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use kernels::{frozen_linear_backward, multiply_add, multiply_in_f32};
use llama_burn::{DecoderLayer, Llama, PackedContext, RmsNorm, VocabTable, operations};
use lora_core::LinearGroup;

use super::layer_pass;
use super::subject::{Subject, numbers, rounded};
use data::Batch;
use train_step::loss;

/// Vocabulary entries that the cross entropy is compared on.
const VOCABULARY: usize = 512;
/// Positions that it is compared on.
const POSITIONS: usize = 16;

/// A result on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The operation.
    pub name: &'static str,
    /// Row-major.
    pub values: Vec<f32>,
    /// The length of a row.
    pub width: usize,
}

/// The inputs of every device: numbers that its type represents exactly, so that only the
/// computation can differ.
pub struct Inputs {
    /// The layer's input, `[n, hidden]`.
    pub hidden: Vec<f32>,
    /// The gradient of its output.
    gradient: Vec<f32>,
    n: usize,
    dtype: FloatDType,
}

impl Inputs {
    /// For a layer and `n` tokens.
    pub fn new(subject: &Subject, n: usize, dtype: FloatDType) -> Self {
        let width = subject.config.hidden_size;
        let values = |seed| of(rounded(numbers(seed, n * width, 1.0), [n, width], dtype));
        Self {
            hidden: values(11),
            gradient: values(12),
            n,
            dtype,
        }
    }

    /// The same, each number changed by up to this relative amount, up or down.
    pub fn shaken(&self, share: f64) -> Self {
        let shake = |values: &[f32], seed| {
            let by = numbers(seed, values.len(), share / 2.0);
            values
                .iter()
                .zip(by)
                .map(|(x, by)| x * (1.0 + by))
                .collect()
        };
        Self {
            hidden: shake(&self.hidden, 13),
            gradient: shake(&self.gradient, 14),
            ..*self
        }
    }

    /// More inputs of this kind, `[n, width]`.
    fn more(&self, seed: u64, width: usize) -> TensorData {
        rounded(
            numbers(seed, self.n * width, 1.0),
            [self.n, width],
            self.dtype,
        )
    }
}

fn of(data: TensorData) -> Vec<f32> {
    data.try_to_vec::<f32>().unwrap_or_default()
}

/// The results of a device for a layer, in a fixed order: operations first, then the passes through
/// the whole layer.
///
/// # Errors
///
/// If the device does not return a tensor.
pub fn run(
    layer: &DecoderLayer,
    subject: &Subject,
    context: &PackedContext,
    inputs: &Inputs,
    dtype: FloatDType,
    device: &Device,
) -> Result<Vec<Output>, String> {
    let run = Run::new(layer, context, inputs, dtype, device);
    let mut outputs = Vec::new();
    run.norms(&mut outputs)?;
    run.products(&mut outputs)?;
    run.low_rank(&mut outputs)?;
    run.attention(subject, &mut outputs)?;
    run.feed_forward(subject, &mut outputs)?;
    run.cross_entropy(subject, &mut outputs)?;
    run.whole(&mut outputs)?;
    Ok(outputs)
}

/// As [`run`], but only the passes through the whole layer.
///
/// # Errors
///
/// As [`run`].
pub fn run_whole(
    layer: &DecoderLayer,
    context: &PackedContext,
    inputs: &Inputs,
    dtype: FloatDType,
    device: &Device,
) -> Result<Vec<Output>, String> {
    let run = Run::new(layer, context, inputs, dtype, device);
    let mut outputs = Vec::new();
    run.whole(&mut outputs)?;
    Ok(outputs)
}

struct Run<'a> {
    layer: &'a DecoderLayer,
    context: &'a PackedContext,
    inputs: &'a Inputs,
    dtype: DType,
    device: &'a Device,
}

type Outputs = Vec<Output>;

impl<'a> Run<'a> {
    fn new(
        layer: &'a DecoderLayer,
        context: &'a PackedContext,
        inputs: &'a Inputs,
        dtype: FloatDType,
        device: &'a Device,
    ) -> Self {
        Self {
            layer,
            context,
            inputs,
            dtype: dtype.into(),
            device,
        }
    }

    fn norms(&self, outputs: &mut Outputs) -> Result<(), String> {
        let norm = &self.layer.input_layernorm;
        let (x, gradient) = (self.hidden(), self.gradient().cast(self.dtype));
        outputs.push(named(
            "rms_norm",
            operations::rms_norm(norm, &x, self.dtype),
        )?);
        let through = operations::rms_norm_backward(norm, &x, gradient);
        outputs.push(named("rms_norm_backward", through)?);
        Ok(())
    }

    /// A product of each shape, forward and backward.
    fn products(&self, outputs: &mut Outputs) -> Result<(), String> {
        let mut seen = Vec::new();
        for (index, (_, linear)) in self.layer.linears().iter().enumerate() {
            let [d_in, d_out] = linear.dims();
            if seen.contains(&[d_in, d_out]) {
                continue;
            }
            seen.push([d_in, d_out]);
            let seed = 20 + 2 * index as u64;
            let alone = (*linear).clone().without_adapter();
            let x = self.place(self.inputs.more(seed, d_in));
            let ([product], _) = LinearGroup::new([&alone], [None]).forward(&x, [None]);
            outputs.push(named("quantized_product", product)?);
            let gradient = self.place(self.inputs.more(seed + 1, d_out));
            let weight = linear.weight.base().without_autodiff();
            let through = frozen_linear_backward(gradient, weight);
            outputs.push(named("quantized_product_backward", through)?);
        }
        Ok(())
    }

    /// An adapter's products, forward and backward.
    fn low_rank(&self, outputs: &mut Outputs) -> Result<(), String> {
        let linears = self.layer.linears();
        let mut linears = linears.iter().map(|(_, linear)| linear);
        let Some(linear) = linears.find(|linear| linear.adapter().is_some()) else {
            return Ok(());
        };
        let (Some(adapter), [d_in, d_out]) = (linear.adapter(), linear.dims()) else {
            return Ok(());
        };
        let factors = adapter.detached_factors();
        let [a, b] = factors.map(|factor| factor.cast(self.dtype));
        let r = a.dims()[1];
        let x = self.place(self.inputs.more(40, d_in));
        let sum = self.place(self.inputs.more(41, d_out));
        let gradient = self.place(self.inputs.more(42, d_out));
        // Each product has its own inputs, so that differences do not add up.
        let low = self.place(self.inputs.more(43, r));
        let scale = adapter.scale();
        let products = [
            multiply_add(None, 1.0, x.clone(), a.clone()),
            multiply_add(Some(sum), scale, low.clone(), b.clone()),
            multiply_add(None, scale, gradient.clone(), b.transpose()),
            multiply_in_f32(low.clone().transpose(), gradient),
            multiply_in_f32(x.transpose(), low),
        ];
        for product in products {
            outputs.push(named("low_rank", product)?);
        }
        Ok(())
    }

    fn attention(&self, subject: &Subject, outputs: &mut Outputs) -> Result<(), String> {
        let config = &subject.config;
        let (queries, keys) = (config.query_width(), config.key_width());
        let [q, k, v, gradient] = [(50, queries), (51, keys), (52, keys), (53, queries)]
            .map(|(seed, width)| self.place(self.inputs.more(seed, width)));
        outputs.push(named(
            "rope",
            operations::rope(q.clone(), self.context, false),
        )?);
        outputs.push(named(
            "rope_backward",
            operations::rope(k.clone(), self.context, true),
        )?);
        let attention = &self.layer.self_attn;
        for (norm, x) in [(&attention.q_norm, &q), (&attention.k_norm, &k)] {
            let Some(norm) = norm else {
                continue;
            };
            outputs.push(named("rms_norm", operations::head_norm(norm, x))?);
            let gradient = self.place(self.inputs.more(54, x.dims()[1]));
            let through = operations::head_norm_backward(norm, x.clone(), gradient);
            outputs.push(named("rms_norm_backward", through)?);
        }
        let (mixed, gradients) =
            operations::attend_and_back(attention, [q, k, v], gradient, self.context);
        outputs.push(named("attention", mixed)?);
        for gradient in gradients {
            outputs.push(named("attention_backward", gradient)?);
        }
        Ok(())
    }

    fn feed_forward(&self, subject: &Subject, outputs: &mut Outputs) -> Result<(), String> {
        let width = subject.config.intermediate_size;
        let [gate, up, gradient] =
            [60, 61, 62].map(|seed| self.place(self.inputs.more(seed, width)));
        outputs.push(named("swiglu", operations::swiglu(&gate, &up))?);
        for gradient in operations::swiglu_backward(gate, up, gradient) {
            outputs.push(named("swiglu_backward", gradient)?);
        }
        Ok(())
    }

    /// The loss of some positions over a part of a vocabulary, and its gradient through `lm_head`
    /// and norm.
    fn cross_entropy(&self, subject: &Subject, outputs: &mut Outputs) -> Result<(), String> {
        let config = &subject.config;
        let (vocab, hidden) = (config.vocab_size.min(VOCABULARY), config.hidden_size);
        let table = numbers(70, vocab * hidden, 2.0 * (hidden as f64).powf(-0.5));
        let table = rounded(table, [vocab, hidden], self.inputs.dtype);
        let mut model = Llama {
            embed_tokens: VocabTable {
                pieces: vec![frozen(self.place(table))],
                rows_per_piece: vocab,
                compute: None,
            },
            layers: Vec::new(),
            norm: RmsNorm {
                weight: self.layer.input_layernorm.weight.clone(),
                eps: config.rms_norm_eps,
            },
            lm_head: None,
            quantized_lm_head: Vec::new(),
            lm_head_adapter: None,
            embed_rows: None,
            head_rows: None,
            config: config.clone(),
        };
        model.config.vocab_size = vocab;
        model.config.tie_word_embeddings = true;
        let positions = POSITIONS.min(self.inputs.n);
        let batch = Batch {
            tokens: Default::default(),
            target_positions: Vec::new(),
            target_ids: (0..positions).map(|i| (i * 37 % vocab) as u32).collect(),
            targets_per_example: vec![positions],
            rows: Vec::new(),
            row_tokens: 0,
        };
        let at = self.hidden().narrow(0, 0, positions);
        let targets = loss::token_ids(&batch.target_ids, self.device);
        let (loss, gradient) =
            loss::loss_and_gradient(&model, at, &batch, &targets, 1.0, &mut |_, _| {});
        let sums = loss.sums();
        outputs.push(Output {
            name: "cross_entropy",
            values: vec![sums.loss as f32],
            width: 1,
        });
        outputs.push(named("cross_entropy", gradient)?);
        Ok(())
    }

    fn whole(&self, outputs: &mut Outputs) -> Result<(), String> {
        let pass = layer_pass(self.layer, self.context);
        let x = self.hidden();
        let (output, activations) = pass.forward(&x);
        outputs.push(named("layer_forward", output)?);
        let mut adapters = Vec::new();
        let mut collect = |_: &Param<Tensor<2>>, gradient: Tensor<2>| adapters.push(gradient);
        let below = pass.backward(&x, activations, self.gradient().into(), true, &mut collect);
        if let Some(below) = below {
            outputs.push(named("layer_backward", below.whole)?);
        }
        for gradient in adapters {
            outputs.push(named("layer_adapter_gradients", gradient)?);
        }
        Ok(())
    }

    fn hidden(&self) -> Tensor<2> {
        self.of_hidden(&self.inputs.hidden)
    }

    fn gradient(&self) -> Tensor<2> {
        self.of_hidden(&self.inputs.gradient)
    }

    fn of_hidden(&self, values: &[f32]) -> Tensor<2> {
        let (n, width) = (self.inputs.n, values.len() / self.inputs.n);
        let data = TensorData::new(values.to_vec(), [n, width]);
        Tensor::from_data(data, (self.device, DType::F32))
    }

    fn place(&self, data: TensorData) -> Tensor<2> {
        Tensor::from_data(data, (self.device, self.dtype))
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(Default::default(), tensor).set_require_grad(false)
}

fn named(name: &'static str, tensor: Tensor<2>) -> Result<Output, String> {
    Ok(Output {
        name,
        ..read(tensor)?
    })
}

/// A tensor on the host; an earlier failure of the device appears here at the latest.
pub fn read(tensor: Tensor<2>) -> Result<Output, String> {
    let width = tensor.dims()[1];
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    let values = data.convert::<f32>().try_to_vec::<f32>();
    Ok(Output {
        name: "",
        values: values.map_err(|error| format!("{error:?}"))?,
        width,
    })
}
