//! Tensors of the base model that are trained themselves: biases (PEFT's `bias`) and whole modules (`modules_to_save`).

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use lora_core::{
    Bias, LoraConfig, LoraError, ModuleSelector, ParameterCounts, Quantization, Trained,
};

use crate::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Llama, LlamaConfig, RmsNorm, VocabTable};

/// Whether `modules_to_save` contains this tensor of the base model: the name of its module, or of a module around it,
/// ends with one of the entries. As in PEFT, `norm` is also the end of `input_layernorm`.
pub fn saved_whole(lora: &LoraConfig, tensor: &str) -> bool {
    let mut modules = tensor.match_indices('.').map(|(dot, _)| &tensor[..dot]);
    modules.any(|module| {
        let mut saved = lora.modules_to_save.iter();
        saved.any(|saved| module.ends_with(saved.as_str()))
    })
}

/// Which tensors of the base model an adapter's settings train.
pub(crate) struct WholeTensors<'a> {
    lora: &'a LoraConfig,
    selector: ModuleSelector,
}

impl<'a> WholeTensors<'a> {
    pub(crate) fn new(lora: &'a LoraConfig) -> Result<Self, LoraError> {
        let selector = lora.selector()?;
        Ok(Self { lora, selector })
    }

    /// Whether the tensor of this Hugging Face name is trained.
    pub(crate) fn contain(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".bias");
        let bias = module.is_some_and(|module| match self.lora.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => self.selector.matches(module),
        });
        bias || saved_whole(self.lora, tensor)
    }
}

/// The elements of the tensors that are trained themselves, by the part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WholeElements {
    /// The embedding.
    pub embedding: usize,
    /// The output layer.
    pub head: usize,
    /// Weights of linear modules in the decoder.
    pub linear: usize,
    /// The bytes that these weights would have if they were frozen.
    pub linear_bytes: usize,
    /// Norms and biases.
    pub vectors: usize,
    /// Biases of B (`lora_bias`), which the base model does not have.
    pub of_b: usize,
    /// Elements of embedding and output layer that are no longer frozen. A tied weight stays if one of the two is frozen.
    pub unfrozen_tables: usize,
}

impl WholeElements {
    /// All of them.
    pub fn sum(self) -> usize {
        self.embedding + self.head + self.linear + self.vectors + self.of_b
    }

    /// The counts with these elements trainable, in f32, and not frozen.
    pub(crate) fn move_to_trainable(
        self,
        mut counts: ParameterCounts,
        float_bytes: usize,
    ) -> ParameterCounts {
        let others = self.unfrozen_tables + self.vectors;
        counts.trainable += self.sum() as u64;
        counts.adapter_bytes += 4 * self.sum() as u64;
        counts.frozen -= (self.linear + others) as u64;
        counts.linear_bytes -= self.linear_bytes as u64;
        counts.other_bytes -= (others * float_bytes) as u64;
        counts
    }
}

impl LlamaConfig {
    /// The tensors of this model that `lora` trains themselves, with Hugging Face's name and shape. The output layer is a
    /// tensor of its own even if it is tied.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid.
    pub fn whole_tensors(&self, lora: &LoraConfig) -> Result<Vec<(String, Vec<usize>)>, LoraError> {
        let whole = WholeTensors::new(lora)?;
        let mut shapes = self.tensor_shapes();
        if self.tie_word_embeddings {
            shapes.push((HEAD_WEIGHT.into(), vec![self.vocab_size, self.hidden_size]));
        }
        shapes.retain(|(name, _)| whole.contain(name));
        Ok(shapes)
    }

    /// Counts the elements of [`whole_tensors`](Self::whole_tensors) and of B's biases. `quantization` and `float_bytes`
    /// are those of frozen weights.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid.
    pub fn whole_elements(
        &self,
        lora: &LoraConfig,
        quantization: Quantization,
        float_bytes: usize,
    ) -> Result<WholeElements, LoraError> {
        let mut elements = WholeElements::default();
        for (name, shape) in self.whole_tensors(lora)? {
            let count: usize = shape.iter().product();
            match (name.as_str(), &shape[..]) {
                (EMBEDDING_WEIGHT, _) => elements.embedding += count,
                (HEAD_WEIGHT, _) => elements.head += count,
                (_, [d_out, d_in]) => {
                    elements.linear += count;
                    elements.linear_bytes += quantization.bytes(*d_in, *d_out, float_bytes);
                }
                _ => elements.vectors += count,
            }
        }
        elements.unfrozen_tables = if self.tie_word_embeddings {
            elements.embedding.min(elements.head)
        } else {
            elements.embedding + elements.head
        };
        if lora.lora_bias {
            let selector = lora.selector()?;
            for layer in 0..self.num_hidden_layers {
                for linear in self.layer_linears() {
                    let module = format!("model.layers.{layer}.{}", linear.name);
                    if selector.matches(&module) {
                        elements.of_b += linear.d_out;
                    }
                }
            }
        }
        Ok(elements)
    }

    /// Checks that every entry of `modules_to_save` is the end of a module's name: one without a match is most likely a
    /// typing error, and would have no effect. A module that is trained as a whole must not have an adapter.
    ///
    /// # Errors
    ///
    /// [`LoraError::MatchesNothing`] with the first entry that matches nothing; [`LoraError::SavedAndAdapted`].
    pub fn check_saved(&self, lora: &LoraConfig) -> Result<(), LoraError> {
        let selector = lora.selector()?;
        for module in self
            .module_shapes()
            .iter()
            .filter(|module| module.is_linear)
        {
            let name = &module.name;
            if selector.matches(name) && saved_whole(lora, &format!("{name}.weight")) {
                return Err(LoraError::SavedAndAdapted(name.as_str().into()));
            }
        }
        let mut shapes = self.tensor_shapes();
        shapes.push((HEAD_WEIGHT.into(), Vec::new()));
        for entry in &lora.modules_to_save {
            let one = LoraConfig {
                modules_to_save: vec![entry.clone()],
                ..LoraConfig::default()
            };
            if shapes.iter().any(|(name, _)| saved_whole(&one, name)) {
                continue;
            }
            let mut kinds: Vec<&str> = Vec::new();
            for (name, _) in &shapes {
                let module = name.rsplit_once('.').map_or("", |(module, _)| module);
                let kind = module.rsplit('.').next().unwrap_or(module);
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            return Err(LoraError::MatchesNothing {
                field: "modules_to_save",
                entry: entry.as_str().into(),
                among: format!("the model's modules ({})", kinds.join(", ")).into(),
                nearest: None,
            });
        }
        Ok(())
    }
}

impl Llama {
    /// The parameters that are trained themselves, by Hugging Face's name of their tensor; B's bias as
    /// `MODULE.lora_B.bias`. A vocabulary weight has several shards. Empty on a device without an autodiff graph.
    pub fn trained_whole(&self) -> Vec<(String, Vec<Trained<'_>>)> {
        let mut all: Vec<(String, Vec<Trained<'_>>)> = Vec::new();
        all.push((
            EMBEDDING_WEIGHT.into(),
            self.embed_tokens.trained().collect(),
        ));
        for (index, layer) in self.layers.iter().enumerate() {
            for (name, linear) in layer.linears() {
                for (parameter, trained) in linear.trained_whole() {
                    let name = format!("model.layers.{index}.{name}.{parameter}");
                    all.push((name, vec![trained]));
                }
            }
            for (name, norm) in layer.norms() {
                let name = format!("model.layers.{index}.{name}.weight");
                all.push((name, norm.trained().into_iter().collect()));
            }
        }
        let norm = self.norm.trained().into_iter().collect();
        all.push(("model.norm.weight".into(), norm));
        let head = self.lm_head.iter().flat_map(VocabTable::trained);
        all.push((HEAD_WEIGHT.into(), head.collect()));
        all.retain(|(_, parts)| !parts.is_empty());
        all
    }

    /// Makes the tensors trainable that `lora` trains themselves: dense, in f32. As in PEFT, an output layer that is tied
    /// to the embedding becomes a weight of its own if one of the two is trained.
    ///
    /// # Errors
    ///
    /// If `lora` is invalid.
    pub fn with_trained_whole(mut self, lora: &LoraConfig) -> Result<Self, LoraError> {
        let whole = WholeTensors::new(lora)?;
        let of_tables = [EMBEDDING_WEIGHT, HEAD_WEIGHT].map(|name| whole.contain(name));
        let [embedding, head] = of_tables;
        if (embedding || head) && self.lm_head.is_none() && self.quantized_lm_head.is_empty() {
            self.untie();
        }
        if embedding {
            self.embed_tokens = self.embed_tokens.into_trained();
        }
        if head {
            self = self.with_dense_head();
            self.lm_head = self.lm_head.map(VocabTable::into_trained);
        }
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for (name, linear) in layer.linears_mut() {
                let name = format!("model.layers.{index}.{name}");
                if whole.contain(&format!("{name}.weight")) {
                    let dense = linear.dense_base();
                    linear.weight = trained(&linear.weight, dense);
                }
                if let Some(bias) = linear.bias.take() {
                    let trains = whole.contain(&format!("{name}.bias"));
                    linear.bias = Some(if trains { trained_vector(bias) } else { bias });
                }
            }
            for (name, norm) in layer.norms_mut() {
                if whole.contain(&format!("model.layers.{index}.{name}.weight")) {
                    norm.train();
                }
            }
        }
        if whole.contain("model.norm.weight") {
            self.norm.train();
        }
        Ok(self)
    }

    /// A quantized output layer as a dense weight.
    fn with_dense_head(mut self) -> Self {
        let pieces = std::mem::take(&mut self.quantized_lm_head);
        if pieces.is_empty() {
            return self;
        }
        let dense = pieces.iter().map(|piece| piece.dense_base().transpose());
        let whole = Tensor::cat(dense.collect(), 0);
        self.lm_head = Some(VocabTable {
            rows_per_piece: whole.dims()[0],
            pieces: vec![Param::initialized(Default::default(), whole)],
            compute: Some(self.dtype()),
        });
        self
    }
}

impl RmsNorm {
    fn train(&mut self) {
        self.weight = trained_vector(self.weight.clone());
    }
}

impl VocabTable {
    /// The weight in f32, trainable.
    fn into_trained(self) -> Self {
        let (compute, device) = (self.compute_dtype(), self.pieces[0].lazy_device());
        let hidden = self.pieces[0].dims()[1];
        let rows_per_piece = Self::rows_per_piece(hidden, DType::F32.size(), &device);
        let rows_per_piece = rows_per_piece.min(self.rows_per_piece);
        let pieces = self.pieces.iter().flat_map(|piece| {
            let whole = piece.val().without_autodiff();
            let count = whole.dims()[0];
            (0..count).step_by(rows_per_piece).map(move |start| {
                let rows = rows_per_piece.min(count - start);
                whole.clone().narrow(0, start, rows)
            })
        });
        let pieces = pieces.map(|rows| trained_from(rows, &device)).collect();
        Self {
            pieces,
            rows_per_piece,
            compute: Some(compute),
        }
    }
}

/// A trainable parameter with these values in f32, in an autodiff graph if `device` is in one.
fn trained_from<const D: usize>(
    values: Tensor<D>,
    device: &burn::tensor::Device,
) -> Param<Tensor<D>> {
    let values = values.without_autodiff().cast(DType::F32);
    let values = if device.is_autodiff() {
        values.autodiff()
    } else {
        values
    };
    Param::from_tensor(values)
}

fn trained(like: &Param<Tensor<2>>, dense: Tensor<2>) -> Param<Tensor<2>> {
    trained_from(dense, &like.lazy_device())
}

fn trained_vector(param: Param<Tensor<1>>) -> Param<Tensor<1>> {
    trained_from(param.val(), &param.lazy_device())
}
