//! Model folders that `merge` writes, compared with those that PEFT's `merge_and_unload` made of
//! the same adapters.

use std::fs;
use std::path::{Path, PathBuf};

use export::merge::{LARGEST_SHARD, MergeError, MergeOptions, UnmergeOptions, merge, unmerge};
use llama_burn::{LlamaConfig, Weights};
use safetensors::Dtype;
use tests::fixture;

fn options(name: &str, output: PathBuf) -> MergeOptions {
    MergeOptions {
        model: fixture(name).join("model"),
        adapter: fixture(name).join("trained"),
        output,
        dtype: Some(Dtype::F32),
        largest_shard: LARGEST_SHARD,
        overwrite: false,
        without_tokenizer: true,
    }
}

/// The tensors of a folder, named as in its own configuration.
fn tensors(folder: &Path) -> Vec<(String, Vec<f32>)> {
    let config = LlamaConfig::from_file(folder).unwrap();
    let shapes = config.tensor_shapes();
    let mut weights = Weights::open(folder).unwrap();
    weights.check(&shapes).unwrap();
    let read = |(name, _): (String, _)| {
        let values = weights.read(&name).unwrap();
        (name, values)
    };
    shapes.into_iter().map(read).collect()
}

#[test]
fn every_kind_of_adapter_merges_to_pefts_weights() {
    let root = tempfile::tempdir().unwrap();
    for name in [
        "tied",
        "biases",
        "dora",
        "vera",
        "patterns",
        "trained_biases",
        "whole_modules",
    ] {
        let output = root.path().join(name);
        merge(&options(name, output.clone()), &mut |_, _| {}).unwrap();
        let (got, expected) = (tensors(&output), tensors(&fixture(name).join("merged")));
        let base = tensors(&fixture(name).join("model"));
        assert_eq!(got.len(), expected.len(), "{name}");
        let mut moved = false;
        for ((tensor, got), (other, expected)) in got.iter().zip(&expected) {
            assert_eq!(tensor, other, "{name}");
            for (got, expected) in got.iter().zip(expected) {
                // A rounding of sums below 4, and a DoRA's norm of them.
                assert!(
                    (got - expected).abs() < 2e-6,
                    "{name} {tensor}: {got} {expected}"
                );
            }
            moved |= base
                .iter()
                .any(|(name, base)| name == tensor && base != got);
        }
        assert!(moved, "{name}: nothing changed");
    }
}

#[test]
fn a_model_comes_apart_again_unless_there_is_not_invertible() {
    let root = tempfile::tempdir().unwrap();
    for (name, way_back) in [
        ("tied", true),
        ("biases", true),
        ("patterns", true),
        ("vera", true),
        ("dora", false),
        ("whole_modules", false),
        ("trained_biases", false),
    ] {
        let merged = root.path().join(name);
        let merging = options(name, merged.clone());
        merge(&merging, &mut |_, _| {}).unwrap();
        let output = root.path().join(format!("{name}-restored"));
        let unmerging = UnmergeOptions {
            model: merged,
            adapter: merging.adapter,
            output: output.clone(),
            dtype: None,
            largest_shard: LARGEST_SHARD,
            overwrite: false,
            force: false,
        };
        match (way_back, unmerge(&unmerging, &mut |_, _| {})) {
            (true, Ok(report)) => {
                let (restored, base) = (tensors(&output), tensors(&merging.model));
                for ((tensor, restored), (_, base)) in restored.iter().zip(&base) {
                    for (restored, base) in restored.iter().zip(base) {
                        let difference = (restored - base).abs();
                        assert!(
                            difference <= report.rounding,
                            "{name} {tensor}: {difference}"
                        );
                    }
                }
            }
            (false, Err(MergeError::NotInvertible { base, .. })) => {
                assert!(base.contains(name), "{base}");
                assert!(!output.exists());
            }
            (_, outcome) => panic!("{name}: {outcome:?}"),
        }
    }
}

#[test]
fn a_merged_folder_is_not_written_over_what_it_is_made_from() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    tests::workspace::copy_folder(&fixture("tied").join("model"), &model);
    let before = fs::read(model.join("model.safetensors")).unwrap();
    let merging = MergeOptions {
        model: model.clone(),
        overwrite: true,
        ..options("tied", model.clone())
    };
    let error = merge(&merging, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::OutputIsInput { .. }), "{error}");
    assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), before);
}
