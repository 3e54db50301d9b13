//! Valid and invalid headers.

use std::io::Cursor;
use std::path::Path;

use super::*;

fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
}

/// A header with these encoded metadata and tensors, followed by `data` bytes.
fn file(keys: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    bytes.extend(keys.concat());
    bytes.extend(tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    text(&mut bytes, name.as_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes
}

fn tensor(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    text(&mut bytes, name.as_bytes());
    bytes.extend((dimensions.len() as u32).to_le_bytes());
    dimensions
        .iter()
        .for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

fn read(bytes: &[u8]) -> Result<Header, String> {
    let header = Header::read(Path::new("x.gguf"), Cursor::new(bytes), bytes.len() as u64);
    header.map_err(|error| error.to_string())
}

#[test]
fn every_type_of_value_is_read_as_it_was_written() {
    let metadata: Vec<(String, Value)> = [
        Value::U8(200),
        Value::I8(-3),
        Value::U16(60_000),
        Value::I16(-300),
        Value::U32(4_000_000_000),
        Value::I32(-70_000),
        Value::F32(1e-5),
        Value::Bool(true),
        Value::Text("Ünïcödé ▁".into()),
        Value::U64(1 << 60),
        Value::I64(-1 << 60),
        Value::F64(0.1),
        Value::Array(Array::Text(vec!["a".into(), String::new(), "▁b".into()])),
        Value::Array(Array::I32(vec![-1, 2, 3])),
        Value::Array(Array::F32(vec![0.5, -0.25])),
        Value::Array(Array::Bool(vec![true, false])),
        Value::Array(Array::U64(vec![])),
    ]
    .into_iter()
    .enumerate()
    .map(|(i, value)| (format!("key.{i}"), value))
    .collect();
    let plans = [
        ("a", vec![3, 32], TensorKind::Q8_0),
        ("b", vec![5], TensorKind::F32),
    ];
    let plans = plans.map(|(name, shape, kind)| TensorPlan {
        name: name.into(),
        shape,
        kind,
    });
    let mut writer = GgufWriter::new(Vec::new(), &metadata, plans.to_vec()).unwrap();
    writer.write(&[1.0; 96]).unwrap();
    writer.write(&[2.0; 5]).unwrap();
    let bytes = writer.finish();
    let header = read(&bytes).unwrap();
    assert_eq!(
        header.metadata.into_iter().collect::<Vec<_>>().len(),
        metadata.len()
    );
    let header = read(&bytes).unwrap();
    for (key, value) in &metadata {
        assert_eq!(header.metadata.get(key), Some(value), "{key}");
    }
    assert_eq!(header.tensors["a"].shape, [3, 32]);
    assert_eq!(header.tensors["a"].bytes, 3 * 34);
    assert_eq!(header.tensors["b"].start % 32, 0);
    // 1e-5 in f32 is meant as 1e-5, not as 9.99999974e-6.
    assert_eq!(header.metadata["key.6"].as_decimal(), Some(1e-5));
}

#[test]
fn other_files_and_versions_are_errors() {
    assert!(
        read(b"PK\x03\x04 and more")
            .unwrap_err()
            .contains("not a GGUF file")
    );
    let mut old = file(&[], &[], 0);
    old[4] = 1;
    assert!(read(&old).unwrap_err().contains("version is 1"));
    let mut big = file(&[], &[], 0);
    big[4..8].reverse();
    assert!(read(&big).unwrap_err().contains("big-endian"));
    assert!(read(b"").unwrap_err().contains("0 bytes are left"));
}

#[test]
fn counts_that_the_file_has_no_room_for_are_refused_before_anything_is_allocated() {
    let huge = u64::MAX.to_le_bytes();
    let large = (1u64 << 40).to_le_bytes();
    let mut counts = file(&[], &[], 64);
    counts[8..16].copy_from_slice(&huge);
    assert!(read(&counts).unwrap_err().contains("tensors"));
    let mut counts = file(&[], &[], 64);
    counts[16..24].copy_from_slice(&large);
    assert!(read(&counts).unwrap_err().contains("metadata keys"));
    for (element, length) in [(0u32, huge), (4, large), (8, huge), (12, huge), (7, large)] {
        let array = [&element.to_le_bytes()[..], &length].concat();
        let error = read(&file(&[key("list", 9, &array)], &[], 64)).unwrap_err();
        assert!(
            error.contains("elements") && error.contains("bytes are left"),
            "{error}"
        );
    }
    let error = read(&file(&[key("text", 8, &huge)], &[], 64)).unwrap_err();
    assert!(error.contains("bytes of text"), "{error}");
}

#[test]
fn every_contradiction_is_an_error_with_its_place() {
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    let mut not_utf8 = Vec::new();
    text(&mut not_utf8, &[0xff, 0xfe]);
    let one = key("one", 4, &7u32.to_le_bytes());
    let alignment = |value: u32| key("general.alignment", 4, &value.to_le_bytes());
    for (keys, tensors, words) in [
        (vec![key("deep", 9, &nested)], vec![], "array of arrays"),
        (
            vec![key("odd", 77, &[])],
            vec![],
            "type that does not exist",
        ),
        (vec![key("flag", 7, &[2])], vec![], "boolean of the value 2"),
        (vec![key("bad", 8, &not_utf8)], vec![], "not UTF-8"),
        (vec![key("", 4, &[0; 4])], vec![], "name of 0 bytes"),
        (vec![one.clone(), one], vec![], "one occurs twice"),
        (vec![alignment(0)], vec![], "power of two"),
        (vec![alignment(48)], vec![], "power of two"),
        (vec![], vec![tensor("w", &[], 0, 0)], "0 dimensions"),
        (vec![], vec![tensor("w", &[1; 5], 0, 0)], "5 dimensions"),
        (
            vec![],
            vec![tensor("w", &[u64::MAX, 2], 0, 0)],
            "dimension of",
        ),
        (
            vec![],
            vec![tensor("w", &[1 << 40, 1 << 40], 0, 0)],
            "dimension of",
        ),
        (vec![], vec![tensor("w", &[33], 8, 0)], "blocks of 32"),
        (
            vec![],
            vec![tensor("w", &[16], 0, 3)],
            "not a multiple of 32",
        ),
        (
            vec![],
            vec![tensor("w", &[17], 0, 0)],
            "after the file's end",
        ),
        (
            vec![],
            vec![tensor("w", &[4], 0, 1 << 62)],
            "after the file's end",
        ),
        (
            vec![],
            vec![tensor("w", &[4], 0, u64::MAX - 31)],
            "after the file's end",
        ),
        (
            vec![],
            vec![tensor("w", &[12], 0, 0), tensor("v", &[4], 0, 32)],
            "overlaps",
        ),
        (
            vec![],
            vec![tensor("w", &[4], 0, 0), tensor("w", &[4], 0, 32)],
            "w occurs twice",
        ),
    ] {
        let error = read(&file(&keys, &tensors, 64)).unwrap_err();
        assert!(
            error.contains(words) && error.contains("x.gguf"),
            "{words}: {error}"
        );
    }
    // An unsupported type is an error only when its tensor is read.
    let header = read(&file(&[], &[tensor("w", &[256], 10, 0)], 64)).unwrap();
    let error = header.kind("w").unwrap_err().to_string();
    assert!(error.contains("Q2_K") && error.contains("Q4_K"), "{error}");
}

#[test]
fn a_header_cut_anywhere_is_an_error() {
    let whole = file(
        &[
            key("one", 4, &7u32.to_le_bytes()),
            key("two", 8, b"\x02\0\0\0\0\0\0\0ab"),
        ],
        &[tensor("w", &[32], 8, 0)],
        34,
    );
    assert!(read(&whole).is_ok());
    for length in 0..whole.len() {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn names_translate_in_both_directions() {
    for (ours, theirs) in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            "blk.0.attn_q.weight",
        ),
        (
            "model.layers.17.self_attn.o_proj.bias",
            "blk.17.attn_output.bias",
        ),
        (
            "model.layers.3.mlp.down_proj.weight",
            "blk.3.ffn_down.weight",
        ),
        (
            "model.layers.3.post_attention_layernorm.weight",
            "blk.3.ffn_norm.weight",
        ),
    ] {
        assert_eq!(llama_cpp_name(ours).as_deref(), Some(theirs));
        assert_eq!(hugging_face_name(theirs).as_deref(), Some(ours));
    }
    for other in [
        "rope_freqs.weight",
        "blk.03.attn_q.weight",
        "blk.0.attn_q",
        "blk.x.attn_q.weight",
    ] {
        assert_eq!(hugging_face_name(other), None, "{other}");
    }
}

#[test]
fn rows_of_rotated_projections_are_reordered_in_both_directions() {
    let config = crate::LlamaConfig {
        head_dim: 4,
        ..Default::default()
    };
    let rows = rows_of("model.layers.0.self_attn.k_proj.weight", &config).unwrap();
    assert_eq!(
        rows_of("model.layers.0.self_attn.v_proj.weight", &config),
        None
    );
    let halves = crate::LlamaConfig {
        family: crate::Family::of_gguf("qwen2").unwrap(),
        ..config
    };
    let key = "model.layers.0.self_attn.k_proj.weight";
    assert_eq!(rows_of(key, &halves), None);
    // Two heads of four rows: halves [0 1 | 2 3] become pairs (0 2)(1 3).
    let values: Vec<i8> = (0..16).collect();
    let theirs = rows.to_llama_cpp(&values, 2);
    assert_eq!(
        theirs,
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    );
    assert_eq!(rows.to_hugging_face(&theirs, 2), values);
}

#[test]
fn q8_0_restores_values_that_it_can_represent() {
    // The largest magnitude of each block is a multiple of 127 of a scale that f16 holds.
    let mut values: Vec<f32> = (0..64)
        .map(|i| ((i * 7 % 255) as f32 - 127.0) * 0.5)
        .collect();
    values[3] = -63.5;
    values[40] = 63.5;
    let plan = TensorPlan {
        name: "w".into(),
        shape: vec![2, 32],
        kind: TensorKind::Q8_0,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut writer = GgufWriter::new(Vec::new(), &[], vec![plan]).unwrap();
    writer.write(&values).unwrap();
    std::fs::write(&path, writer.finish()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.floats("w").unwrap(), values);
    let tensor = file.integers("w").unwrap().unwrap();
    assert_eq!((tensor.block, &tensor.scales[..]), (32, &[0.5, 0.5][..]));
    assert_eq!(f32::from(tensor.integers[40]) * 0.5, values[40]);
}

#[test]
fn a_value_outside_the_range_of_f16_is_rejected_by_name() {
    let plan = TensorPlan {
        name: "blk.0.attn_q.weight".into(),
        shape: vec![2],
        kind: TensorKind::F16,
    };
    let mut writer = GgufWriter::new(Vec::new(), &[], vec![plan]).unwrap();
    let error = writer.write(&[1.0, 1e6]).unwrap_err().to_string();
    assert!(
        error.contains("blk.0.attn_q.weight") && error.contains("1000000"),
        "{error}"
    );
}
