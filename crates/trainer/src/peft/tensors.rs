//! `adapter_model.safetensors`: the adapter's matrices under PEFT's names.

use std::borrow::Cow;
use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors, View};

use super::AdapterError;

const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The two matrices of one adapted module, on the host, row-major, as `lora_core` lays them out:
/// `a` is `[d_in, r]` and `b` is `[r, d_out]` (PEFT's file holds both transposed).
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
}

impl AdapterPair {
    /// A pair of these sizes.
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
        }
    }
}

/// An adapter's matrices by Hugging Face module name (`model.layers.0.self_attn.q_proj`).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterTensors {
    /// The matrices; the order of the names is the order in the file.
    pub modules: BTreeMap<String, AdapterPair>,
}

/// PEFT's names of a module's two tensors.
pub fn tensor_names(module: &str) -> [String; 2] {
    [
        format!("{PREFIX}{module}{A}"),
        format!("{PREFIX}{module}{B}"),
    ]
}

impl AdapterTensors {
    /// The bytes of `adapter_model.safetensors`, in f32.
    ///
    /// # Errors
    ///
    /// [`AdapterError::NotFinite`] for a matrix that holds NaN or infinity: such an adapter is
    /// never written; [`AdapterError::Safetensors`] where the format cannot hold the tensors.
    pub fn to_bytes(&self) -> Result<Vec<u8>, AdapterError> {
        let mut tensors = Vec::new();
        for (module, pair) in &self.modules {
            let [a, b] = tensor_names(module);
            let (d_in, r, d_out) = (pair.d_in, pair.r, pair.d_out);
            tensors.push((a, Matrix::transposed(&pair.a, [d_in, r])));
            tensors.push((b, Matrix::transposed(&pair.b, [r, d_out])));
        }
        for (name, matrix) in &tensors {
            check_finite(name, &matrix.values)?;
        }
        let metadata = [("format".to_string(), "pt".to_string())].into();
        safetensors::serialize(tensors, Some(metadata)).map_err(|error| AdapterError::Safetensors {
            reason: error.to_string(),
        })
    }

    /// Reads the bytes of `adapter_model.safetensors`; f16 and bf16 are widened to f32.
    ///
    /// # Errors
    ///
    /// A tensor whose name is not that of a `lora_A` or `lora_B`, that lacks its partner, whose
    /// rank is not `r`, whose type is not a float, or that holds NaN or infinity, by its name; a
    /// file that is cut off or is no safetensors file.
    pub fn from_bytes(bytes: &[u8], r: usize) -> Result<Self, AdapterError> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| AdapterError::Safetensors {
            reason: error.to_string(),
        })?;
        let mut halves: BTreeMap<String, [Option<Matrix>; 2]> = BTreeMap::new();
        for (name, view) in file.iter() {
            let module = name.strip_prefix(PREFIX).and_then(|rest| {
                let a = rest.strip_suffix(A).map(|module| (module, 0));
                a.or_else(|| rest.strip_suffix(B).map(|module| (module, 1)))
            });
            let Some((module, half)) = module else {
                return Err(AdapterError::Unexpected { name: name.into() });
            };
            let matrix = Matrix::read(name, view.dtype(), view.shape(), view.data())?;
            halves.entry(module.into()).or_default()[half] = Some(matrix);
        }
        let mut modules = BTreeMap::new();
        for (module, [a, b]) in halves {
            let [a_name, b_name] = tensor_names(&module);
            let a = a.ok_or(AdapterError::Missing {
                name: a_name.clone(),
            })?;
            let b = b.ok_or(AdapterError::Missing {
                name: b_name.clone(),
            })?;
            let ([a_r, d_in], [d_out, b_r]) = (a.shape, b.shape);
            if a_r != r {
                return Err(AdapterError::shape(a_name, &[r, d_in], &[a_r, d_in]));
            }
            if b_r != r {
                return Err(AdapterError::shape(b_name, &[d_out, r], &[d_out, b_r]));
            }
            let a = Matrix::transposed(&a.values, [r, d_in]).values;
            let b = Matrix::transposed(&b.values, [d_out, r]).values;
            modules.insert(
                module,
                AdapterPair {
                    d_in,
                    d_out,
                    r,
                    a,
                    b,
                },
            );
        }
        Ok(Self { modules })
    }
}

fn check_finite(name: &str, values: &[f32]) -> Result<(), AdapterError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(AdapterError::NotFinite {
            name: name.into(),
            index,
            value: values[index],
        }),
    }
}

/// A row-major f32 matrix as a safetensors file holds it.
struct Matrix {
    shape: [usize; 2],
    values: Vec<f32>,
}

impl Matrix {
    /// The transpose of a row-major `[rows, columns]` matrix.
    fn transposed(values: &[f32], [rows, columns]: [usize; 2]) -> Self {
        let mut transposed = vec![0.0; values.len()];
        for (row, line) in values.chunks_exact(columns.max(1)).enumerate() {
            for (column, value) in line.iter().enumerate() {
                transposed[column * rows + row] = *value;
            }
        }
        Self {
            shape: [columns, rows],
            values: transposed,
        }
    }

    fn read(name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<Self, AdapterError> {
        let &[rows, columns] = shape else {
            return Err(AdapterError::Rank {
                name: name.into(),
                got: shape.to_vec(),
            });
        };
        let values = read_floats(dtype, data).ok_or_else(|| AdapterError::Dtype {
            name: name.into(),
            got: format!("{dtype:?}"),
        })?;
        check_finite(name, &values)?;
        Ok(Self {
            shape: [rows, columns],
            values,
        })
    }
}

/// Little-endian floats of a safetensors file as f32, or `None` where the type is no float.
pub(crate) fn read_floats(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let half = |convert: fn([u8; 2]) -> f32| {
        let pairs = data.chunks_exact(2);
        pairs.map(|pair| convert([pair[0], pair[1]])).collect()
    };
    match dtype {
        Dtype::F32 => Some(
            data.chunks_exact(4)
                .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                .collect(),
        ),
        Dtype::F16 => Some(half(|bytes| half::f16::from_le_bytes(bytes).to_f32())),
        Dtype::BF16 => Some(half(|bytes| half::bf16::from_le_bytes(bytes).to_f32())),
        _ => None,
    }
}

impl View for Matrix {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<_>>()
            .into()
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const Q: &str = "model.layers.0.self_attn.q_proj";

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
        assert_eq!(AdapterTensors::from_bytes(&bytes, 3).unwrap(), example());
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
    fn half_precision_is_widened() {
        let one = half::bf16::from_f32(1.5).to_le_bytes();
        assert_eq!(read_floats(Dtype::BF16, &one), Some(vec![1.5]));
        let one = half::f16::from_f32(-2.0).to_le_bytes();
        assert_eq!(read_floats(Dtype::F16, &one), Some(vec![-2.0]));
        assert_eq!(read_floats(Dtype::I64, &[0; 8]), None);
    }

    #[test]
    fn a_wrong_tensor_is_named_with_expected_and_got() {
        let [a, b] = tensor_names(Q);
        let read = |tensors| {
            let error = AdapterTensors::from_bytes(&file(tensors), 3).unwrap_err();
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
            let error = AdapterTensors::from_bytes(&bytes[..length], 3).unwrap_err();
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
