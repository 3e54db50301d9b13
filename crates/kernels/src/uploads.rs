//! Joins a batch's indices and tables into one tensor per type for the copy to a GPU. A separate copy per tensor would
//! make the GPU's queue wait each time.

use std::ops::Range;

use crate::dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// The values to copy.
#[derive(Debug, Default)]
pub struct Uploads {
    ints: Vec<i32>,
    floats: Vec<f32>,
}

/// The range of some integers among all that are copied.
#[derive(Debug, Clone)]
pub struct Ints(Range<usize>);

/// The range of some floats among all that are copied.
#[derive(Debug, Clone)]
pub struct Floats(Range<usize>);

impl Uploads {
    /// Adds indices.
    pub fn ints(&mut self, values: impl IntoIterator<Item = i32>) -> Ints {
        let start = self.ints.len();
        self.ints.extend(values);
        Ints(start..self.ints.len())
    }

    /// Adds indices of tokens or positions.
    pub fn indices(&mut self, values: &[u32]) -> Ints {
        self.ints(values.iter().map(|value| *value as i32))
    }

    /// Adds floats.
    pub fn floats(&mut self, values: impl IntoIterator<Item = f32>) -> Floats {
        let start = self.floats.len();
        self.floats.extend(values);
        Floats(start..self.floats.len())
    }

    /// Copies everything to `device`.
    pub fn send(self, device: &Device) -> Uploaded {
        let device = device.clone().without_autodiff();
        if !dispatch::of_device(&device).joins_uploads() {
            // Separate tensors: here a copy is free, and kernels need tensors that start where their memory starts.
            return Uploaded(Copied::Apart(self, device));
        }
        let (ints, floats) = (self.ints.len(), self.floats.len());
        Uploaded(Copied::Together {
            ints: (ints > 0)
                .then(|| Tensor::from_data(TensorData::new(self.ints, [ints]), &device)),
            floats: (floats > 0).then(|| {
                Tensor::from_data(
                    TensorData::new(self.floats, [floats]),
                    (&device, DType::F32),
                )
            }),
        })
    }
}

/// The copied values on the device.
#[derive(Debug)]
pub struct Uploaded(Copied);

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // One per batch.
enum Copied {
    Apart(Uploads, Device),
    Together {
        ints: Option<Tensor<1, Int>>,
        floats: Option<Tensor<1>>,
    },
}

impl Ints {
    /// Where they begin among all integers.
    #[cfg(feature = "cube")]
    pub(crate) fn start(&self) -> usize {
        self.0.start
    }
}

impl Uploaded {
    /// All integers in one tensor, `[count]`, for kernels that find their part themselves.
    #[cfg(feature = "cube")]
    pub(crate) fn all_ints(&self) -> Tensor<1, Int> {
        match &self.0 {
            Copied::Together {
                ints: Some(all), ..
            } => all.clone(),
            _ => unreachable!("a GPU's integers are copied together"),
        }
    }

    /// The integers at `at`, `[count]`.
    pub fn ints(&self, at: &Ints) -> Tensor<1, Int> {
        let count = at.0.len();
        match &self.0 {
            Copied::Apart(all, device) => {
                let values = all.ints[at.0.clone()].to_vec();
                Tensor::from_data(TensorData::new(values, [count]), device)
            }
            Copied::Together {
                ints: Some(all), ..
            } => all.clone().narrow(0, at.0.start, count),
            Copied::Together { ints: None, .. } => unreachable!("a range of the copied values"),
        }
    }

    /// The floats at `at` in f32.
    pub fn floats<const D: usize>(&self, at: &Floats, shape: [usize; D]) -> Tensor<D> {
        match &self.0 {
            Copied::Apart(all, device) => {
                let values = all.floats[at.0.clone()].to_vec();
                Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
            }
            Copied::Together {
                floats: Some(all), ..
            } => {
                let part = all.clone().narrow(0, at.0.start, at.0.len());
                part.reshape(shape)
            }
            Copied::Together { floats: None, .. } => unreachable!("a range of the copied values"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back_as_they_were_added() {
        let mut uploads = Uploads::default();
        let (a, b) = (uploads.ints([3, 1, 2]), uploads.indices(&[7, 9]));
        let c = uploads.floats((0..6).map(|i| i as f32));
        let d = uploads.floats([0.5]);
        let sent = uploads.send(&Device::flex());
        let ints = |at: &Ints| sent.ints(at).into_data().try_to_vec::<i32>().unwrap();
        assert_eq!(ints(&a), [3, 1, 2]);
        assert_eq!(ints(&b), [7, 9]);
        let c = sent.floats(&c, [2, 3]).into_data();
        c.assert_eq(&TensorData::from([[0f32, 1.0, 2.0], [3.0, 4.0, 5.0]]), true);
        assert_eq!(sent.floats(&d, [1]).into_scalar::<f32>(), 0.5);
    }
}
