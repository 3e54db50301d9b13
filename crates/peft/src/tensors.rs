//! `adapter_model.safetensors`: the adapter's tensors under PEFT's names.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use kernels::cpu;
use llama_burn::floats::first_not_finite;
use llama_burn::{EMBEDDING_WEIGHT, HEAD_WEIGHT, floats, saved_whole};
use lora_core::{Bias, LoraConfig, Method, Width};
use safetensors::{Dtype, SafeTensors};

use super::shared::{Shared, shared_name};
use super::{AdapterError, not_written};
use crate::Floats;

const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const EMBEDDING_A: &str = ".lora_embedding_A";
const EMBEDDING_B: &str = ".lora_embedding_B";
const B_BIAS: &str = ".lora_B.bias";
/// The name of a module inside PEFT's wrapper.
const WRAPPED: &str = ".base_layer";
/// The base model's tensors of a saved module. PEFT writes them when it saves an embedding by itself, and does not
/// read them.
const ORIGINAL: &str = ".original_module.";
/// The tensors of a saved module. PEFT also writes them under this name when it saves an embedding by itself.
const COPY: &str = ".modules_to_save.";

/// PEFT's wrapper of a vocabulary table with trained rows.
pub(super) const TOKENS: &str = ".token_adapter";
/// The trained rows. They replace those of the table; despite the name they are not a difference.
const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// The tensors of one adapted module, on the host, row-major, in the layout of `lora_core`:
/// `a` is `[d_in, r]` and `b` is `[r, d_out]` (PEFT's file holds both transposed).
///
/// An embedding is a module from tokens to hidden states: d_in is the size of the vocabulary.
///
/// If all modules share their matrices ([`AdapterTensors::shared`]), a module has vectors only: `a` and `b` are empty, and
/// `d_in` is 0, because PEFT's file does not contain it. [`AdapterTensors::low_rank`] makes the matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPair {
    /// Width of the module's input.
    pub d_in: usize,
    /// Width of the module's output.
    pub d_out: usize,
    /// Rank.
    pub r: usize,
    /// `[d_in, r]`.
    pub a: Vec<f32>,
    /// `[r, d_out]`.
    pub b: Vec<f32>,
    /// The vectors of the adapter's method, `[d_out]` or `[r]`, by the end of PEFT's names
    /// ([`Facts::vectors`](lora_core::Facts::vectors)).
    pub vectors: BTreeMap<&'static str, Vec<f32>>,
    /// The bias of B that `lora_bias` trains, before the scale, `[d_out]`.
    pub bias: Option<Vec<f32>>,
}

impl AdapterPair {
    /// A pair of these sizes, without vectors and bias.
    ///
    /// # Panics
    ///
    /// If the lengths are not `d_in·r` and `r·d_out`.
    pub fn new(d_in: usize, r: usize, d_out: usize, a: Vec<f32>, b: Vec<f32>) -> Self {
        assert_eq!(a.len(), d_in * r, "lora_A of [{d_in}, {r}]");
        assert_eq!(b.len(), r * d_out, "lora_B of [{r}, {d_out}]");
        Self {
            d_in,
            d_out,
            r,
            a,
            b,
            vectors: BTreeMap::new(),
            bias: None,
        }
    }

    /// A pair without matrices, whose module uses those that all modules share.
    pub fn of_vectors(r: usize, d_out: usize, vectors: BTreeMap<&'static str, Vec<f32>>) -> Self {
        Self {
            d_in: 0,
            d_out,
            r,
            a: Vec::new(),
            b: Vec::new(),
            vectors,
            bias: None,
        }
    }

    /// Whether the module has matrices of its own.
    pub fn has_matrices(&self) -> bool {
        self.d_in > 0
    }
}

/// A tensor that replaces one of the base model, row-major as Hugging Face stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct WholeTensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<f32>,
}

/// An adapter's tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterTensors {
    /// The tensors of the adapted modules, by Hugging Face module name (`model.layers.0.self_attn.q_proj`).
    /// The file has them in the order of the names.
    pub modules: BTreeMap<String, AdapterPair>,
    /// Tensors that replace the base model's, by Hugging Face's name (`model.norm.weight`): trained biases,
    /// modules that were saved as a whole, and embeddings that PEFT saves beside their adapter.
    pub whole: BTreeMap<String, WholeTensor>,
    /// Rows that replace rows of a vocabulary table, `[tokens, hidden]`, by the table's module
    /// (`model.embed_tokens`). `trainable_token_indices` holds their tokens.
    pub token_rows: BTreeMap<String, WholeTensor>,
    /// The frozen matrices that all modules share, for a method that has them. `None` if they are to be made from the
    /// seed in the settings (`save_projection` is false).
    pub shared: Option<Shared>,
}

/// The embedding's module.
pub(super) const EMBEDDING: &str = "model.embed_tokens";

/// PEFT's names of a module's two factors.
pub fn tensor_names(module: &str) -> [String; 2] {
    let [a, b] = match module {
        EMBEDDING => [EMBEDDING_A, EMBEDDING_B],
        _ => [A, B],
    };
    [
        format!("{PREFIX}{module}{a}"),
        format!("{PREFIX}{module}{b}"),
    ]
}

/// PEFT's name of a vector of a module's method; `vector` is its end.
pub fn vector_name(module: &str, vector: &str) -> String {
    format!("{PREFIX}{module}.{vector}")
}

/// PEFT's names of the tensors of a module that are trained, in the order of
/// [`LoraLinear::trainable`](lora_core::LoraLinear::trainable).
pub fn trained_names(module: &str, method: Method) -> Vec<String> {
    let facts = method.facts();
    let matrices = tensor_names(module).into_iter();
    let matrices = matrices.filter(|_| facts.shared.is_none());
    let vectors = facts.vectors.iter();
    let vectors = vectors.map(|vector| vector_name(module, vector.name));
    matrices.chain(vectors).collect()
}

/// The vectors of every method.
pub(super) fn all_vectors() -> impl Iterator<Item = &'static str> {
    let methods = Method::ALL.into_iter();
    let vectors = methods.flat_map(|method| method.facts().vectors.iter());
    vectors.map(|vector| vector.name)
}

/// PEFT's name of the bias of B that `lora_bias` trains.
pub(super) fn bias_name(module: &str) -> String {
    format!("{PREFIX}{module}{B_BIAS}")
}

/// PEFT's name of a vocabulary table's trained rows.
pub(super) fn token_rows_name(module: &str) -> String {
    format!("{PREFIX}{module}{TOKEN_ROWS}")
}

/// Which part of a module's adapter a tensor is.
enum Place {
    A,
    B,
    Bias,
    Vector(&'static str),
}

/// The module that a tensor belongs to, and which part of its adapter it is. `None` for other tensors.
fn place(name: &str) -> Option<(&str, Place)> {
    let ends = [
        (A, Place::A),
        (B, Place::B),
        (EMBEDDING_A, Place::A),
        (EMBEDDING_B, Place::B),
        (B_BIAS, Place::Bias),
    ];
    let mut ends = ends.into_iter();
    let matrix = ends.find_map(|(end, place)| Some((name.strip_suffix(end)?, place)));
    let vector = |vector: &'static str| {
        // PEFT removes this end when it saves. A state dict that was saved without PEFT has this end.
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let module = module.strip_suffix(vector)?.strip_suffix('.')?;
        Some((module, Place::Vector(vector)))
    };
    matrix.or_else(|| all_vectors().find_map(vector))
}

/// Whether the settings allow a tensor of the base model in the file.
fn explained(lora: &LoraConfig, tensor: &str) -> bool {
    let embedding = [EMBEDDING_WEIGHT, HEAD_WEIGHT].contains(&tensor);
    let bias = lora.bias != Bias::None && tensor.ends_with(".bias");
    embedding || bias || saved_whole(lora, tensor)
}

/// A module's tensors, as far as they have been read.
#[derive(Default)]
struct Parts {
    a: Option<Values>,
    b: Option<Values>,
    bias: Option<Values>,
    vectors: BTreeMap<&'static str, Values>,
}

impl AdapterTensors {
    /// Returns the bytes of `adapter_model.safetensors`, in f32.
    ///
    /// # Errors
    ///
    /// [`AdapterError::NotFinite`] for a tensor with NaN or infinity, which is never written;
    /// [`AdapterError::Safetensors`] for tensors that the format cannot hold.
    pub fn to_bytes(&self) -> Result<Vec<u8>, AdapterError> {
        let written = safetensors::serialize(self.entries()?, Some(metadata()));
        written.map_err(|error| AdapterError::Safetensors {
            reason: error.to_string(),
        })
    }

    /// Writes the bytes of [`to_bytes`](Self::to_bytes) to a file, atomically, one tensor at a time.
    ///
    /// # Errors
    ///
    /// [`AdapterError::NotFinite`] as in [`to_bytes`](Self::to_bytes); [`AdapterError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), AdapterError> {
        let entries = self.entries()?;
        let write = |path: &Path| durable::write_tensors(path, entries, metadata());
        durable::write_atomically_by(path, write).map_err(not_written)
    }

    /// The tensors of the file, in PEFT's layout.
    fn entries(&self) -> Result<Vec<(String, Floats<'_>)>, AdapterError> {
        let mut tensors = Vec::new();
        for (module, pair) in &self.modules {
            let [a, b] = tensor_names(module);
            let (d_in, r, d_out) = (pair.d_in, pair.r, pair.d_out);
            if pair.has_matrices() {
                tensors.push((a, Floats::transposed(&pair.a, [d_in, r])));
                tensors.push((b, Floats::transposed(&pair.b, [r, d_out])));
            }
            if let Some(bias) = &pair.bias {
                tensors.push((bias_name(module), Floats::new(bias, vec![bias.len()])));
            }
            for (name, vector) in &pair.vectors {
                let entry = Floats::new(vector, vec![vector.len()]);
                tensors.push((vector_name(module, name), entry));
            }
        }
        for (name, tensor) in &self.whole {
            let name = match name.rsplit_once('.') {
                Some((module, end)) if self.modules.contains_key(module) => {
                    format!("{PREFIX}{module}{WRAPPED}.{end}")
                }
                _ => format!("{PREFIX}{name}"),
            };
            tensors.push((name, Floats::new(&tensor.values, tensor.shape.clone())));
        }
        for (module, tensor) in &self.token_rows {
            let rows = Floats::new(&tensor.values, tensor.shape.clone());
            tensors.push((token_rows_name(module), rows));
        }
        if let Some(shared) = &self.shared {
            tensors.extend(shared.entries());
        }
        for (name, tensor) in &tensors {
            check_finite(name, tensor.values())?;
        }
        Ok(tensors)
    }

    /// Reads the bytes of `adapter_model.safetensors`; f16 and bf16 are widened to f32.
    ///
    /// # Errors
    ///
    /// By its name, a tensor that the settings do not explain, that lacks its partner, that has another rank than
    /// the module, whose type is not f32, f16 or bf16, or that holds NaN or infinity. A file that is cut off or that
    /// is not a safetensors file.
    pub fn from_bytes(bytes: &[u8], lora: &LoraConfig) -> Result<Self, AdapterError> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| AdapterError::Safetensors {
            reason: error.to_string(),
        })?;
        let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
        let mut whole = BTreeMap::new();
        let mut copies: BTreeMap<String, WholeTensor> = BTreeMap::new();
        let mut token_rows = BTreeMap::new();
        let shared_names = lora.method.facts().shared.filter(|_| lora.save_projection);
        let mut shared = [const { None }; 2];
        for (name, view) in file.iter() {
            let unexpected = || AdapterError::Unexpected { name: name.into() };
            let read = || Values::read(name, view.dtype(), view.shape(), view.data());
            let place_of_shared = shared_names
                .and_then(|names| names.iter().position(|end| shared_name(end) == name));
            if let Some(index) = place_of_shared {
                shared[index] = Some(read()?);
                continue;
            }
            let rest = name.strip_prefix(PREFIX).ok_or_else(unexpected)?;
            if let Some((module, place)) = place(rest) {
                let values = read()?;
                if matches!(place, Place::A | Place::B) {
                    values.matrix(name)?;
                }
                let parts = parts.entry(module.into()).or_default();
                let before = match place {
                    Place::A => parts.a.replace(values),
                    Place::B => parts.b.replace(values),
                    Place::Bias if lora.lora_bias => parts.bias.replace(values),
                    Place::Vector(name) if lora.method.facts().vector(name).is_some() => {
                        parts.vectors.insert(name, values)
                    }
                    Place::Bias | Place::Vector(_) => return Err(unexpected()),
                };
                if before.is_some() {
                    return Err(unexpected());
                }
                continue;
            }
            if let Some(module) = rest.strip_suffix(TOKEN_ROWS) {
                let Values { shape, values } = read()?;
                token_rows.insert(module.into(), WholeTensor { shape, values });
                continue;
            }
            // If PEFT saves embeddings, the whole table is in the file too.
            let tensor = rest.replace(TOKENS, "").replace(WRAPPED, "");
            let is_original = tensor.contains(ORIGINAL);
            let is_copy = tensor.contains(COPY);
            let tensor = tensor.replace(ORIGINAL, ".").replace(COPY, ".");
            if !explained(lora, &tensor) {
                return Err(unexpected());
            }
            let Values { shape, values } = read()?;
            if is_original {
                continue;
            }
            let into = if is_copy { &mut copies } else { &mut whole };
            let tensor = into.insert(tensor, WholeTensor { shape, values });
            if tensor.is_some() {
                return Err(unexpected());
            }
        }
        for (tensor, copy) in copies {
            let known = whole.entry(tensor.clone()).or_insert_with(|| copy.clone());
            if *known != copy {
                return Err(AdapterError::TwoVersions { tensor });
            }
        }
        let selector = lora.selector()?;
        let mut modules = BTreeMap::new();
        for (module, parts) in parts {
            let r = selector.r(&module);
            let pair = match lora.method.facts().shared {
                None => pair(&module, parts, lora, r)?,
                Some(_) => vectors_only(&module, parts, lora, r)?,
            };
            modules.insert(module, pair);
        }
        Ok(Self {
            modules,
            whole,
            token_rows,
            shared: shared_names
                .map(|names| Shared::from_file(names, shared, lora.r))
                .transpose()?,
        })
    }
}

/// Combines the tensors of a module without matrices of its own.
fn vectors_only(
    module: &str,
    parts: Parts,
    lora: &LoraConfig,
    r: usize,
) -> Result<AdapterPair, AdapterError> {
    let [a, b] = tensor_names(module);
    for (matrix, name) in [(parts.a, a), (parts.b, b)] {
        if matrix.is_some() {
            return Err(AdapterError::Unexpected { name });
        }
    }
    let facts = lora.method.facts();
    let outputs = facts
        .vectors
        .iter()
        .find(|vector| vector.width == Width::Outputs);
    let outputs = outputs.and_then(|vector| parts.vectors.get(vector.name));
    let d_out = outputs.map_or(0, |values| values.values.len());
    let vectors = vectors_of(module, parts.vectors, lora, [r, d_out])?;
    Ok(AdapterPair::of_vectors(r, d_out, vectors))
}

/// The vectors of a module's method, with the right lengths.
fn vectors_of(
    module: &str,
    mut found: BTreeMap<&'static str, Values>,
    lora: &LoraConfig,
    [r, d_out]: [usize; 2],
) -> Result<BTreeMap<&'static str, Vec<f32>>, AdapterError> {
    let vectors = lora.method.facts().vectors.iter();
    let vectors = vectors.map(|vector| {
        let name = vector_name(module, vector.name);
        let values = vector_of(found.remove(vector.name), name, vector.length(r, d_out))?;
        Ok((vector.name, values))
    });
    vectors.collect()
}

/// The elements of a tensor that must be a vector of this length.
fn vector_of(
    values: Option<Values>,
    name: String,
    length: usize,
) -> Result<Vec<f32>, AdapterError> {
    let Some(values) = values else {
        return Err(AdapterError::Missing { name });
    };
    if values.shape[..] == [length] {
        Ok(values.values)
    } else {
        Err(AdapterError::shape(name, &[length], &values.shape))
    }
}

/// Combines a module's tensors.
fn pair(
    module: &str,
    parts: Parts,
    lora: &LoraConfig,
    r: usize,
) -> Result<AdapterPair, AdapterError> {
    let [a_name, b_name] = tensor_names(module);
    let needed = |values: Option<Values>, name: &str| {
        values.ok_or(AdapterError::Missing { name: name.into() })
    };
    let a = needed(parts.a, &a_name)?;
    let b = needed(parts.b, &b_name)?;
    let ([a_r, d_in], [d_out, b_r]) = (a.matrix(&a_name)?, b.matrix(&b_name)?);
    if a_r != r {
        return Err(AdapterError::shape(a_name, &[r, d_in], &[a_r, d_in]));
    }
    if b_r != r {
        return Err(AdapterError::shape(b_name, &[d_out, r], &[d_out, b_r]));
    }
    let bias = if lora.lora_bias {
        Some(vector_of(parts.bias, bias_name(module), d_out)?)
    } else {
        None
    };
    let vectors = vectors_of(module, parts.vectors, lora, [r, d_out])?;
    Ok(AdapterPair {
        d_in,
        d_out,
        r,
        a: Values::transposed(&a.values, [r, d_in]).values,
        b: Values::transposed(&b.values, [d_out, r]).values,
        bias,
        vectors,
    })
}

fn check_finite(name: &str, values: &[f32]) -> Result<(), AdapterError> {
    match first_not_finite(values.iter().copied()) {
        None => Ok(()),
        Some((index, value)) => Err(AdapterError::NotFinite {
            name: name.into(),
            index,
            value,
        }),
    }
}

/// The row-major elements of a tensor, widened to f32.
pub(super) struct Values {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Values {
    /// The transpose of a row-major `[rows, columns]` matrix.
    pub fn transposed(values: &[f32], [rows, columns]: [usize; 2]) -> Self {
        Self {
            shape: vec![columns, rows],
            values: cpu::transposed(values, [rows, columns]),
        }
    }

    pub fn matrix(&self, name: &str) -> Result<[usize; 2], AdapterError> {
        match self.shape[..] {
            [rows, columns] => Ok([rows, columns]),
            _ => Err(AdapterError::Rank {
                name: name.into(),
                got: self.shape.clone(),
            }),
        }
    }

    fn read(name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<Self, AdapterError> {
        let values = read_floats(dtype, data).ok_or_else(|| AdapterError::Dtype {
            name: name.into(),
            got: format!("{dtype:?}"),
        })?;
        check_finite(name, &values)?;
        Ok(Self {
            shape: shape.to_vec(),
            values,
        })
    }
}

/// Little-endian floats of a safetensors file as f32, or `None` if the type is not f32, f16 or bf16.
pub fn read_floats(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    floats::to_f32(data, &format!("{dtype:?}"))
}

fn metadata() -> HashMap<String, String> {
    [("format".to_string(), "pt".to_string())].into()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const Q: &str = "model.layers.0.self_attn.q_proj";

    fn lora() -> LoraConfig {
        LoraConfig {
            r: 3,
            ..LoraConfig::default()
        }
    }

    pub fn example() -> AdapterTensors {
        let ramp = |length: usize, scale: f32| (0..length).map(|i| i as f32 * scale).collect();
        let mut tensors = AdapterTensors::default();
        for (module, d_out) in [(Q, 4), ("model.layers.0.self_attn.k_proj", 2)] {
            let pair = AdapterPair::new(6, 3, d_out, ramp(18, 0.5), ramp(3 * d_out, -0.25));
            tensors.modules.insert(module.into(), pair);
        }
        tensors
    }

    /// A safetensors file of these tensors.
    fn file(tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)>) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
            (*name, view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn zeros(name: &str, shape: [usize; 2]) -> (&str, Dtype, Vec<usize>, Vec<u8>) {
        (
            name,
            Dtype::F32,
            shape.to_vec(),
            vec![0; shape[0] * shape[1] * 4],
        )
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let bytes = example().to_bytes().unwrap();
        assert_eq!(
            AdapterTensors::from_bytes(&bytes, &lora()).unwrap(),
            example()
        );
    }

    #[test]
    fn the_file_holds_pefts_names_and_transposed_matrices() {
        let bytes = example().to_bytes().unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let [a, b] = tensor_names(Q);
        assert_eq!(
            a,
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        );
        assert_eq!(file.tensor(&a).unwrap().shape(), [3, 6]);
        assert_eq!(file.tensor(&b).unwrap().shape(), [4, 3]);
        let values = read_floats(Dtype::F32, file.tensor(&a).unwrap().data()).unwrap();
        // Row 1 of A in the file is column 1 of ours: elements 1, 4, 7, … times 0.5.
        assert_eq!(values[6..9], [0.5, 2.0, 3.5]);
        assert_eq!(file.len(), 4);
    }

    #[test]
    fn magnitudes_biases_embeddings_and_whole_tensors_read_back_under_pefts_names() {
        let lora = LoraConfig {
            r: 3,
            lora_bias: true,
            bias: Bias::LoraOnly,
            modules_to_save: vec!["norm".into()],
            rank_pattern: vec![("embed_tokens".into(), 1)],
            ..LoraConfig::default()
        };
        let mut tensors = example();
        for pair in tensors.modules.values_mut() {
            pair.bias = Some(vec![0.5; pair.d_out]);
        }
        let mut embedding = AdapterPair::new(5, 1, 2, vec![1.0; 5], vec![2.0; 2]);
        embedding.bias = Some(vec![0.0; 2]);
        tensors.modules.insert(EMBEDDING.into(), embedding);
        for (name, shape) in [
            ("model.layers.0.self_attn.q_proj.bias", vec![4]),
            ("model.layers.0.input_layernorm.weight", vec![6]),
            ("model.norm.weight", vec![6]),
            (EMBEDDING_WEIGHT, vec![5, 2]),
        ] {
            let values = vec![0.25; shape.iter().product()];
            tensors
                .whole
                .insert(name.into(), WholeTensor { shape, values });
        }
        let bytes = tensors.to_bytes().unwrap();
        assert_eq!(AdapterTensors::from_bytes(&bytes, &lora).unwrap(), tensors);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, shape) in [
            ("model.layers.0.self_attn.q_proj.base_layer.bias", vec![4]),
            ("model.layers.0.self_attn.q_proj.lora_B.bias", vec![4]),
            ("model.layers.0.input_layernorm.weight", vec![6]),
            ("model.embed_tokens.base_layer.weight", vec![5, 2]),
            ("model.embed_tokens.lora_embedding_A", vec![1, 5]),
            ("model.embed_tokens.lora_embedding_B", vec![2, 1]),
        ] {
            assert_eq!(
                file.tensor(&format!("{PREFIX}{name}")).unwrap().shape(),
                shape
            );
        }

        let dora = LoraConfig {
            method: Method::Dora,
            r: 3,
            ..LoraConfig::default()
        };
        let mut tensors = example();
        for pair in tensors.modules.values_mut() {
            pair.vectors
                .insert("lora_magnitude_vector", vec![1.5; pair.d_out]);
        }
        let bytes = tensors.to_bytes().unwrap();
        assert_eq!(AdapterTensors::from_bytes(&bytes, &dora).unwrap(), tensors);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(
            file.tensor(&vector_name(Q, "lora_magnitude_vector"))
                .unwrap()
                .shape(),
            [4]
        );
        // Neither file fits the other settings: one has an extra tensor, the other lacks it.
        let error = AdapterTensors::from_bytes(&bytes, &super::tests::lora()).unwrap_err();
        assert!(
            error.to_string().contains("lora_magnitude_vector"),
            "{error}"
        );
        let plain = example().to_bytes().unwrap();
        let error = AdapterTensors::from_bytes(&plain, &dora)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("lora_magnitude_vector") && error.contains("missing"),
            "{error}"
        );
    }

    #[test]
    fn a_tensor_of_the_base_model_needs_a_setting_that_explains_it() {
        let norm = "base_model.model.model.norm.weight";
        let bytes = file(vec![(norm, Dtype::F32, vec![2], vec![0; 8])]);
        let error = AdapterTensors::from_bytes(&bytes, &lora()).unwrap_err();
        assert!(error.to_string().contains(norm), "{error}");
        let mut saved = lora();
        saved.modules_to_save = vec!["norm".into()];
        assert_eq!(
            AdapterTensors::from_bytes(&bytes, &saved)
                .unwrap()
                .whole
                .len(),
            1
        );
    }

    #[test]
    fn a_wrong_tensor_is_named_with_expected_and_got() {
        let [a, b] = tensor_names(Q);
        let read = |tensors| {
            let error = AdapterTensors::from_bytes(&file(tensors), &lora()).unwrap_err();
            error.to_string()
        };
        let missing = read(vec![zeros(&a, [3, 6])]);
        assert!(
            missing.contains(&b) && missing.contains("missing"),
            "{missing}"
        );
        let rank = read(vec![zeros(&a, [2, 6]), zeros(&b, [4, 3])]);
        assert!(
            rank.contains(&a) && rank.contains("[2, 6]") && rank.contains("[3, 6]"),
            "{rank}"
        );
        let swapped = read(vec![zeros(&a, [3, 6]), zeros(&b, [3, 4])]);
        assert!(
            swapped.contains(&b) && swapped.contains("[3, 4]"),
            "{swapped}"
        );
        let magnitude = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector";
        assert!(read(vec![zeros(magnitude, [1, 4])]).contains(magnitude));
        let integers = (a.as_str(), Dtype::I32, vec![3, 6], vec![0; 72]);
        assert!(read(vec![integers]).contains("I32"));
        let vector = (a.as_str(), Dtype::F32, vec![18], vec![0; 72]);
        assert!(read(vec![vector]).contains("[18]"));
        let nan = (
            a.as_str(),
            Dtype::F32,
            vec![1, 1],
            f32::NAN.to_le_bytes().to_vec(),
        );
        assert!(read(vec![nan]).contains("NaN"));
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error() {
        let bytes = example().to_bytes().unwrap();
        for length in [0, 4, 20, bytes.len() - 1] {
            let error = AdapterTensors::from_bytes(&bytes[..length], &lora()).unwrap_err();
            assert!(matches!(error, AdapterError::Safetensors { .. }));
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_never_written() {
        let mut tensors = example();
        tensors.modules.get_mut(Q).unwrap().b[5] = f32::INFINITY;
        let error = tensors.to_bytes().unwrap_err().to_string();
        assert!(
            error.contains("q_proj.lora_B") && error.contains("inf"),
            "{error}"
        );
    }
}
