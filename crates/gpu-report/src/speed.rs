//! The speed of a layer's parts, relative to the device's peak.

use burn::tensor::activation::{silu, softmax};
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use kernels::{Quantization, frozen_linear, frozen_linear_backward, product, quantize_on_device};
use llama_burn::{Activations, LayerPass, LinearSpec, Llama, LlamaConfig};
use lora_core::LoraConfig;

use super::clock::Clock;
use super::error::ReportError;
use super::finding::{Finding, Group, LeftOut, Rate};
use super::shapes::Shape;
use super::timing::seconds;
use super::trainee::{batch, options};
use device::Selected;
use terminal::statistics::Spread;

/// Tokens that the parts are measured with.
const TOKENS: usize = 2048;

/// The peak is that of the largest square product that takes less than this.
const LONGEST_PRODUCT: f64 = 0.25;

/// Nothing is started with fewer seconds left, because kernels are first tuned for a new shape.
const LEAST: f64 = 3.0;

/// The state of the measurements.
struct Bench<'a> {
    device: &'a Device,
    clock: Clock,
    quick: bool,
    tell: &'a mut dyn FnMut(Finding),
}

/// Measures peaks, products, attention, a layer and element-wise chains, until the time limit.
///
/// # Errors
///
/// If the device fails.
pub fn run(
    selected: &Selected,
    clock: Clock,
    quick: bool,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    let types = device::types(selected);
    let Some(auto) = types.first().copied() else {
        return Ok(());
    };
    let config = if quick {
        Shape::Embedded.config()?
    } else {
        Shape::Llama8B.config()?
    };
    let mut bench = Bench {
        device: &selected.device,
        clock,
        quick,
        tell,
    };
    bench.copy()?;
    bench.peak(auto)?;
    bench.layer(&config, auto)?;
    bench.attention(&config, auto)?;
    bench.products(&config, auto)?;
    bench.element_wise(&config, auto)?;
    for dtype in &types[1..] {
        bench.peak(*dtype)?;
    }
    Ok(())
}

impl Bench<'_> {
    fn tokens(&self) -> usize {
        if self.quick { 64 } else { TOKENS }
    }

    /// Whether there is time for another measurement; reports what is skipped otherwise.
    fn has_time(&mut self, what: &str) -> bool {
        let has = self.clock.has(LEAST);
        if !has {
            (self.tell)(Finding::LeftOut(LeftOut {
                what: format!("speed: {what}"),
                why: "no time left".into(),
            }));
        }
        has
    }

    fn random(&self, shape: [usize; 2], dtype: FloatDType) -> Tensor<2> {
        // With constants a GPU would reach higher clocks than with real data.
        let uniform = Distribution::Uniform(-0.5, 0.5);
        Tensor::random(shape, uniform, (self.device, DType::from(dtype)))
    }

    /// Reports a speed for `flops` operations, or for `bytes` bytes.
    fn rate(
        &mut self,
        what: &str,
        group: Group,
        dtype: FloatDType,
        size: String,
        (flops, bytes): (f64, f64),
        spread: Spread,
    ) {
        let by_second =
            |amount: f64, unit: f64| (amount > 0.0).then(|| amount / spread.median / unit);
        (self.tell)(Finding::Rate(Rate {
            what: what.into(),
            group,
            dtype: device::type_name(dtype),
            size,
            tflops: by_second(flops, 1e12),
            gbs: by_second(bytes, 1e9),
            milliseconds: [spread.median, spread.min, spread.max].map(|seconds| 1e3 * seconds),
        }));
    }

    /// Reads one f32 tensor and writes another.
    fn copy(&mut self) -> Result<(), ReportError> {
        let elements: usize = if self.quick { 1 << 20 } else { 1 << 27 };
        let tensor = Tensor::<1>::ones([elements], (self.device, DType::F32));
        let spread = seconds(self.device, || tensor.clone().add_scalar(1.0))?;
        let bytes = 8.0 * elements as f64;
        let size = format!("{} MiB read and written", elements >> 18);
        let f32 = FloatDType::F32;
        self.rate("copy", Group::PeakCopy, f32, size, (0.0, bytes), spread);
        Ok(())
    }

    fn peak(&mut self, dtype: FloatDType) -> Result<(), ReportError> {
        let sizes: &[usize] = if self.quick {
            &[256]
        } else {
            &[1024, 2048, 4096, 8192]
        };
        let mut took: Option<(usize, Spread)> = None;
        for size in sizes {
            if let Some((before, spread)) = &took {
                let expected = spread.median * (*size as f64 / *before as f64).powi(3);
                if expected > LONGEST_PRODUCT {
                    break;
                }
            }
            if !self.has_time("largest product") {
                break;
            }
            let [a, b] = [0, 1].map(|_| self.random([*size; 2], dtype));
            let spread = seconds(self.device, || product(a.clone(), b.clone()))?;
            took = Some((*size, spread));
        }
        if let Some((size, spread)) = took {
            let flops = 2.0 * (size as f64).powi(3);
            let text = format!("{size}×{size}×{size}");
            let group = Group::PeakProduct;
            self.rate("largest product", group, dtype, text, (flops, 0.0), spread);
        }
        Ok(())
    }

    /// The layer's products: dense, and with an 8-bit weight in both directions.
    fn products(&mut self, config: &LlamaConfig, dtype: FloatDType) -> Result<(), ReportError> {
        let tokens = self.tokens();
        let mut shapes: Vec<(String, [usize; 2])> = Vec::new();
        for LinearSpec {
            name, d_in, d_out, ..
        } in config.layer_linears()
        {
            let name = name.split('.').next_back().unwrap_or(name);
            match shapes.iter_mut().find(|(_, shape)| *shape == [d_in, d_out]) {
                Some((names, _)) => *names += &format!(", {name}"),
                None => shapes.push((name.to_owned(), [d_in, d_out])),
            }
        }
        for (name, [d_in, d_out]) in shapes {
            if !self.has_time(&name) {
                break;
            }
            let flops = 2.0 * (tokens * d_in * d_out) as f64;
            let size = format!("{tokens}×{d_in}×{d_out}");
            let (x, y) = (
                self.random([tokens, d_in], dtype),
                self.random([tokens, d_out], dtype),
            );
            let drawn = self.random([d_in, d_out], FloatDType::F32);
            let dense = drawn.clone().cast(DType::from(dtype));
            let packed = quantize_on_device(drawn, Quantization::Bits8);
            let device = self.device;
            let forward = seconds(device, || product(x.clone(), dense.clone()))?;
            let mut tell = |what: &str, spread| {
                let what = format!("{name}: {what}");
                let group = Group::Product;
                self.rate(&what, group, dtype, size.clone(), (flops, 0.0), spread);
            };
            tell("dense", forward);
            let forward = seconds(device, || frozen_linear(x.clone(), packed.clone()))?;
            tell("8 bits", forward);
            let backward = seconds(device, || frozen_linear_backward(y.clone(), packed.clone()))?;
            tell("8 bits, backward", backward);
            // Which kernel is the fastest is measured for each shape; here each is used in turn.
            kernels::for_each_product_kernel(device, DType::from(dtype), |kernel| {
                let forward = seconds(device, || frozen_linear(x.clone(), packed.clone()))?;
                tell(&format!("8 bits, {kernel}"), forward);
                let backward =
                    seconds(device, || frozen_linear_backward(y.clone(), packed.clone()))?;
                tell(&format!("8 bits, backward, {kernel}"), backward);
                Ok::<(), ReportError>(())
            })?;
        }
        Ok(())
    }

    /// A layer whose width is cut to 64, so that attention is nearly all of its work.
    fn attention(&mut self, config: &LlamaConfig, dtype: FloatDType) -> Result<(), ReportError> {
        let narrow = LlamaConfig {
            hidden_size: 64,
            intermediate_size: 64,
            ..config.clone()
        };
        let pairs = self.tokens() as f64 * (self.tokens() + 1) as f64 / 2.0;
        let width = (config.num_attention_heads * config.head_dim) as f64;
        // Two products over the keys that each query attends to; twice as many in the backward
        // pass.
        let forward = 2.0 * 2.0 * pairs * width;
        self.passes(
            "attention",
            Group::Attention,
            &narrow,
            dtype,
            [forward, 2.0 * forward],
        )
    }

    /// A whole layer with the default adapters.
    fn layer(&mut self, config: &LlamaConfig, dtype: FloatDType) -> Result<(), ReportError> {
        let tokens = self.tokens() as f64;
        let linears = config.layer_linears();
        let weights: usize = linears.iter().map(LinearSpec::elements).sum();
        let attention = 2.0 * tokens * (tokens + 1.0);
        let attention = attention * (config.num_attention_heads * config.head_dim) as f64;
        let products = 2.0 * tokens * weights as f64;
        let flops = [products + attention, products + 2.0 * attention];
        self.passes("decoder layer", Group::Layer, config, dtype, flops)
    }

    /// The forward and the backward pass of one layer, with these numbers of operations.
    fn passes(
        &mut self,
        what: &str,
        group: Group,
        config: &LlamaConfig,
        dtype: FloatDType,
        [forward_flops, backward_flops]: [f64; 2],
    ) -> Result<(), ReportError> {
        if !self.has_time(what) {
            return Ok(());
        }
        let config = LlamaConfig {
            num_hidden_layers: 1,
            vocab_size: 1024,
            tie_word_embeddings: true,
            ..config.clone()
        };
        let tokens = self.tokens();
        let in_graph = self.device.clone().autodiff();
        let model = Llama::random_on_device(&config, options(dtype), &in_graph);
        let model = model.with_lora(&LoraConfig::default(), 1)?;
        let batch = batch(1, tokens, config.vocab_size);
        let context = model.manual_context(&batch.tokens);
        let pass = LayerPass {
            layer: &model.layers[0],
            context: &context,
            dropout_seed: None,
            output_positions: None,
        };
        let x = model.manual_embeddings(&batch.tokens.ids);
        let size = format!("{tokens} tokens");
        let forward = seconds(self.device, || pass.forward(&x))?;
        let text = format!("{what}, forward");
        self.rate(
            &text,
            group,
            dtype,
            size.clone(),
            (forward_flops, 0.0),
            forward,
        );
        if !self.has_time(what) {
            return Ok(());
        }
        let (output, activations): (_, Activations) = pass.forward(&x);
        let backward = seconds(self.device, || {
            let mut kept = Vec::new();
            let mut collect = |_: &_, gradient| kept.push(gradient);
            let gradient = output.clone().into();
            let below = pass.backward(&x, activations.clone(), gradient, true, &mut collect);
            (below, kept)
        })?;
        let text = format!("{what}, backward");
        self.rate(&text, group, dtype, size, (backward_flops, 0.0), backward);
        Ok(())
    }

    fn element_wise(&mut self, config: &LlamaConfig, dtype: FloatDType) -> Result<(), ReportError> {
        if !self.has_time("element-wise chains") {
            return Ok(());
        }
        let (tokens, device) = (self.tokens(), self.device);
        let float = DType::from(dtype).size() as f64;
        let [wide, narrow] = [config.intermediate_size, config.hidden_size];
        let moved = |tensors: f64, width: usize| (0.0, tensors * float * (tokens * width) as f64);
        let size = |width: usize| format!("{tokens}×{width}");
        let group = Group::ElementWise;

        let [gate, up] = [0, 1].map(|_| self.random([tokens, wide], dtype));
        let spread = seconds(device, || silu(gate.clone()) * up.clone())?;
        self.rate("SwiGLU", group, dtype, size(wide), moved(3.0, wide), spread);

        let x = self.random([tokens, narrow], dtype);
        let ones = Tensor::ones([narrow], (device, DType::F32));
        let norm = llama_burn::RmsNorm {
            weight: burn::module::Param::initialized(Default::default(), ones),
            eps: 1e-5,
        };
        let spread = seconds(device, || norm.forward(x.clone()))?;
        self.rate(
            "RMSNorm",
            group,
            dtype,
            size(narrow),
            moved(2.0, narrow),
            spread,
        );

        let spread = seconds(device, || softmax(x.clone(), 1))?;
        self.rate(
            "softmax",
            group,
            dtype,
            size(narrow),
            moved(2.0, narrow),
            spread,
        );
        Ok(())
    }
}
