//! Why the assets cannot be made.

/// Why the embedded model and data set cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeAssetsError {
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] durable::WriteError),
    /// The tokenizer cannot be trained or used.
    #[error("the tokenizer: {0}")]
    Tokenizer(String),
    /// The model's own configuration is refused.
    #[error(transparent)]
    Config(#[from] llama_burn::ConfigError),
    /// Pretraining diverged.
    #[error("pretraining diverged: the loss is {loss} at step {step}; try another --seed")]
    Diverged {
        /// The optimizer step, counted from 1.
        step: usize,
        /// The loss there.
        loss: f32,
    },
    /// A weight that f16 cannot represent.
    #[error("the tensor {name} holds {value}, which f16 cannot represent; try another --seed")]
    OutOfRange {
        /// Hugging Face's name.
        name: String,
        /// The weight.
        value: f32,
    },
    /// The weights cannot be written as safetensors.
    #[error("model.safetensors: {0}")]
    Safetensors(#[from] safetensors::SafeTensorError),
}
