//! The models whose training is measured: shapes without weights.

use llama_burn::LlamaConfig;

use super::error::ReportError;
use run_config::embedded;

/// A model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The model that is embedded in the program.
    Embedded,
    /// SmolLM2-135M.
    Smol,
    /// Llama 3.2 1B.
    Llama1B,
    /// Llama 3.1 8B.
    Llama8B,
}

impl Shape {
    /// From the smallest to the largest.
    pub const ALL: [Self; 4] = [Self::Embedded, Self::Smol, Self::Llama1B, Self::Llama8B];

    /// Its name in the report and for `--shape`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Smol => "SmolLM2-135M",
            Self::Llama1B => "Llama-3.2-1B",
            Self::Llama8B => "Llama-3.1-8B",
        }
    }

    /// Its `config.json`.
    ///
    /// # Errors
    ///
    /// If the embedded model cannot be unpacked.
    pub fn json(self) -> Result<String, ReportError> {
        Ok(match self {
            Self::Embedded => {
                let path = embedded::materialise()?.model_dir.join("config.json");
                std::fs::read_to_string(&path)
                    .map_err(|source| ReportError::ReadFile { path, source })?
            }
            Self::Smol => include_str!("../../bench/src/shapes/smollm2-135m.json").into(),
            Self::Llama1B => include_str!("../../bench/src/shapes/llama-3.2-1b.json").into(),
            Self::Llama8B => include_str!("../../bench/src/shapes/llama-3.1-8b.json").into(),
        })
    }

    /// Its configuration.
    ///
    /// # Errors
    ///
    /// As [`json`](Self::json).
    pub fn config(self) -> Result<LlamaConfig, ReportError> {
        let object =
            serde_json::from_str(&self.json()?).map_err(|source| ReportError::ShapeJson {
                shape: self.name(),
                source,
            })?;
        Ok(LlamaConfig::from_json(&object)?)
    }
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|shape| shape.name() == word);
        found.ok_or_else(|| format!("no shape is called {word:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_have_the_parameters_that_their_names_say() {
        let parameters = |shape: Shape| {
            let config = shape.config().unwrap();
            let lora = lora_core::LoraConfig::default();
            let none = lora_core::Quantization::None;
            config.count(&lora, none, 4).unwrap().frozen
        };
        assert_eq!(parameters(Shape::Smol), 134_515_008);
        assert_eq!(parameters(Shape::Llama1B), 1_235_814_400);
        assert_eq!(parameters(Shape::Llama8B), 8_030_261_248);
        for shape in Shape::ALL {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
    }
}
