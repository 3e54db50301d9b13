//! The model outside its layers: embeddings, final norm and output layer.

use burn::module::Param;
use burn::tensor::{DType, Int, Tensor};
use kernels::{SCORES_AT_ONCE, Uploads, frozen_linear_backward};
use lora_core::LinearGroup;

use crate::packed::Planned;
use crate::{Llama, PackedContext, PackedTokens};

/// The input of the manual passes through the layers.
#[derive(Debug, Clone)]
pub struct ManualInputs<const N: usize> {
    /// The data of the batch that every layer needs.
    pub context: PackedContext,
    /// The embeddings, `[n, hidden]`, f32.
    pub hidden: Tensor<2>,
    /// The lists that were passed along.
    pub indices: [Tensor<1, Int>; N],
}

impl Llama {
    /// As [`embed`](Self::embed), for the manual passes: f32, the type of their hidden states.
    ///
    /// # Panics
    ///
    /// As [`embed`](Self::embed).
    pub fn manual_embeddings(&self, ids: &[u32]) -> Tensor<2> {
        self.embedded(ids).without_autodiff().cast(DType::F32)
    }

    /// As [`context`](Self::context), for the manual passes ([`LayerPass`](crate::LayerPass)).
    pub fn manual_context(&self, packed: &PackedTokens) -> PackedContext {
        let device = self.device().without_autodiff();
        PackedContext::new(packed, &self.config, self.dtype(), &device)
    }

    /// A packed batch on the device, ready for the manual passes: its context, its embeddings, and additional `lists`
    /// of positions or tokens. On a GPU all of this takes two copies from the host.
    ///
    /// # Panics
    ///
    /// As [`embed`](Self::embed).
    pub fn manual_inputs<const N: usize>(
        &self,
        packed: &PackedTokens,
        lists: [&[u32]; N],
    ) -> ManualInputs<N> {
        let device = self.device().without_autodiff();
        let mut uploads = Uploads::default();
        let (dtype, most) = (self.dtype(), SCORES_AT_ONCE);
        let context = Planned::new(packed, &self.config, dtype, &device, most, &mut uploads);
        let rows = self.embed_tokens.planned_rows(&packed.ids, &mut uploads);
        let trained = self.embed_rows.as_ref();
        let trained = trained.map(|rows| (rows, rows.planned(&packed.ids, &mut uploads)));
        let lists = lists.map(|list| uploads.indices(list));
        let uploaded = uploads.send(&device);
        let hidden = self.embed_tokens.rows_at(&rows, &uploaded);
        let hidden = hidden.without_autodiff().cast(DType::F32);
        ManualInputs {
            context: context.on_device(&uploaded),
            hidden: match trained {
                Some((rows, planned)) => rows.put(hidden, &planned, &uploaded),
                None => hidden,
            },
            indices: lists.map(|list| uploaded.ints(&list)),
        }
    }

    /// As [`logits`](Self::logits), outside an autodiff graph. `hidden` is f32.
    pub fn manual_logits(&self, hidden: &Tensor<2>) -> Tensor<2> {
        let (hidden, _) = self.norm.manual_forward(hidden, self.dtype());
        let logits = match (&self.quantized_lm_head[..], &self.lm_head) {
            ([], head) => {
                let table = head.as_ref().unwrap_or(&self.embed_tokens);
                table.logits(hidden.clone())
            }
            (pieces, _) => {
                let logits = pieces.iter().map(|piece| {
                    let ([logits], _) = LinearGroup::new([piece], [None]).forward(&hidden, [None]);
                    logits
                });
                Tensor::cat(logits.collect(), 1)
            }
        };
        let logits = match self.rows_of_head() {
            Some(rows) => rows.logits(hidden.clone(), logits),
            None => logits,
        };
        let logits = match &self.lm_head_adapter {
            Some(adapter) => adapter.manual_forward(&hidden, logits),
            None => logits,
        };
        logits.cast(DType::F32)
    }

    /// The gradient of `hidden` from that of [`manual_logits`](Self::manual_logits)' output. The gradients of the
    /// head's adapter and trained rows, and of the norm and the head if these are trained, go to `accumulate`, in f32.
    ///
    /// # Shapes
    ///
    /// - `hidden`, output: `[m, hidden]`, f32
    /// - `gradient`: `[m, vocab]`, f32 or the model's type
    pub fn manual_logits_backward(
        &self,
        hidden: &Tensor<2>,
        gradient: Tensor<2>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Tensor<2> {
        let dtype = self.dtype();
        let gradient = gradient.cast(dtype);
        let inverse_rms = self.norm.inverse_rms(hidden);
        let normalized = || self.norm.again(hidden, &inverse_rms, dtype);
        // Kept only for an adapter: it is as large as the logits.
        let adapter = self.lm_head_adapter.as_ref();
        let adapter = adapter.map(|adapter| (adapter, gradient.clone()));
        let (gradient, d_rows_input) = match self.rows_of_head() {
            Some(rows) => {
                let [others, d_input] = rows.logits_backward(normalized(), gradient, accumulate);
                (others, Some(d_input))
            }
            None => (gradient, None),
        };
        if let Some(head) = self.lm_head.as_ref().filter(|head| head.trains()) {
            head.gradient_of_logits(&normalized(), &gradient, accumulate);
        }
        let d_normalized = match (&self.quantized_lm_head[..], &self.lm_head) {
            ([], head) => head
                .as_ref()
                .unwrap_or(&self.embed_tokens)
                .logits_backward(gradient.clone()),
            (pieces, _) => {
                let mut start = 0;
                let mut sum: Option<Tensor<2>> = None;
                for piece in pieces {
                    let rows = piece.dims()[1];
                    let gradient = gradient.clone().narrow(1, start, rows);
                    start += rows;
                    let part = frozen_linear_backward(gradient, piece.weight.base());
                    sum = Some(match sum {
                        Some(sum) => sum + part,
                        None => part,
                    });
                }
                sum.unwrap_or_else(|| hidden.zeros_like())
            }
        };
        let d_normalized = match d_rows_input {
            Some(d_input) => d_normalized + d_input,
            None => d_normalized,
        };
        let d_normalized = match adapter {
            Some((adapter, d_logits)) => {
                adapter.backward(normalized(), d_logits, d_normalized, accumulate)
            }
            None => d_normalized,
        };
        self.norm
            .gradient_of_gain(hidden, &inverse_rms, &d_normalized, accumulate);
        let (gain, zeros, dtype) = (self.norm.gain(), hidden.zeros_like(), hidden.dtype());
        self.norm
            .backward(hidden, inverse_rms, gain, d_normalized, zeros, dtype)
            .0
    }
}
