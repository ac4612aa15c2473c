//! The GGUF reader: decoded blocks against the Python package `gguf`, and files that are not what they should be.

mod common;

use std::path::Path;

use common::{Gguf, Value};
use nibble_model::gguf::{BlockType, ElementType, GgufFile};
use proptest::prelude::*;

/// The bytes that `text` spells in hexadecimal.
fn bytes(text: &str) -> Vec<u8> {
    let digit = |digit: u8| (digit as char).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

#[test]
fn every_block_format_decodes_to_the_bits_that_the_python_package_gives() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/ggml_blocks.json")).unwrap();
    for block in BlockType::ALL {
        let blocks = bytes(golden[block.name()]["blocks"].as_str().unwrap());
        let expected = bytes(golden[block.name()]["values"].as_str().unwrap());
        let mut values = vec![0.0; blocks.len() / block.bytes() * block.elements()];
        block.decode(&blocks, &mut values);
        let found: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(!found.is_empty() && found == expected, "{}", block.name());
    }
}

/// A valid file with every kind of metadata and two tensors.
fn small() -> Gguf {
    let mut gguf = Gguf::default();
    gguf.set("general.architecture", "llama".into());
    gguf.set("size", Value::U32(7));
    gguf.set("epsilon", Value::F32(1e-5));
    gguf.set("switch", Value::Bool(true));
    gguf.set("tokens", Value::Strings(vec!["a".to_owned(), "ä".to_owned()]));
    gguf.set("types", Value::I32s(vec![1, 3]));
    gguf.set("scores", Value::F32s(vec![0.5, -1.0]));
    gguf.floats("vector", &[3], &[1.0, 2.0, 3.0]);
    gguf.tensors.push(common::Tensor {
        name: "matrix".to_owned(),
        shape: vec![2, 32],
        kind: BlockType::Q8_0.number(),
        data: [[0, 0x3c].as_slice(), &[1; 32], &[0, 0x40], &[255; 32]].concat(),
    });
    gguf
}

/// Opens a file of these bytes.
fn open(bytes: &[u8]) -> Result<GgufFile, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path).map_err(|error| error.to_string())
}

#[test]
fn metadata_and_tensors_read_back() {
    let file = open(&small().bytes()).unwrap();
    assert_eq!(file.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(file.integer("size").unwrap(), Some(7));
    assert_eq!(file.float("epsilon").unwrap().map(|value| value as f32), Some(1e-5));
    assert_eq!(file.flag("switch").unwrap(), Some(true));
    assert_eq!(file.strings("tokens").unwrap().unwrap(), ["a", "ä"]);
    assert_eq!(file.integers("types").unwrap().unwrap(), [1, 3]);
    assert_eq!(file.floats("scores").unwrap().unwrap(), [0.5, -1.0]);
    assert_eq!(file.string("absent").unwrap(), None);
    let error = file.string("size").unwrap_err().to_string();
    assert!(error.contains("model.gguf") && error.contains("\"size\" is 7, expected a string"), "{error}");
    let matrix = file.tensor("matrix").unwrap();
    assert_eq!((matrix.shape, matrix.element_type), (&[2, 32][..], ElementType::Block(BlockType::Q8_0)));
    let mut values = vec![0.0; 64];
    BlockType::Q8_0.decode(matrix.data, &mut values);
    assert_eq!((values[0], values[32]), (1.0, -2.0));
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = small().bytes();
    for length in 0..bytes.len() {
        let error = open(&bytes[..length]).unwrap_err();
        assert!(error.contains("model.gguf"), "{length}: {error}");
    }
}

#[test]
fn counts_and_sizes_that_no_file_has_are_refused_before_anything_is_allocated() {
    let patched = |position: usize, value: u64| {
        let mut bytes = small().bytes();
        bytes[position..position + 8].copy_from_slice(&value.to_le_bytes());
        open(&bytes).unwrap_err()
    };
    for huge in [u64::MAX, 1 << 40, u64::MAX / 32] {
        assert!(patched(8, huge).contains("the number of tensors"));
        assert!(patched(16, huge).contains("the number of metadata entries"));
        assert!(patched(24, huge).contains("the length of the key of metadata entry 0"));
    }
    let with_shape = |shape: Vec<usize>| {
        let mut gguf = small();
        gguf.tensor("vector").shape = shape;
        open(&gguf.bytes()).unwrap_err()
    };
    assert!(with_shape(vec![usize::MAX, 2]).contains("tensor \"vector\" has the impossible shape"));
    assert!(with_shape(vec![1 << 40]).contains("does not end within"));
    assert!(with_shape(vec![]).contains("0 dimensions"));
    assert!(with_shape(vec![1; 5]).contains("5 dimensions"));
    let mut gguf = small();
    gguf.tensor("matrix").shape = vec![2, 31];
    assert!(open(&gguf.bytes()).unwrap_err().contains("rows of 31 elements"));
}

#[test]
fn files_of_another_kind_are_named() {
    assert!(open(b"{\"a\": 1}").unwrap_err().contains("not a GGUF file"));
    let with_version = |version: u32| {
        let mut bytes = small().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        open(&bytes)
    };
    assert!(with_version(2).is_ok());
    assert!(with_version(1).unwrap_err().contains("version is 1"));
    assert!(with_version(3u32.swap_bytes()).unwrap_err().contains("3, big-endian"));
}

#[test]
fn tensors_that_overlap_or_are_misaligned_or_there_twice_are_named() {
    let mut gguf = small();
    gguf.tensor("matrix").name = "vector".to_owned();
    assert!(open(&gguf.bytes()).unwrap_err().contains("tensor \"vector\" is there twice"));
    let mut gguf = small();
    gguf.metadata.push(("size".to_owned(), Value::U32(8)));
    assert!(open(&gguf.bytes()).unwrap_err().contains("metadata \"size\" is there twice"));
    // The offset of "matrix" is the last field of the table, before the padding.
    let bytes = small().bytes();
    let end_of_name = bytes.windows(6).rposition(|window| window == b"matrix").unwrap() + 6;
    let offset = end_of_name + 4 + 2 * 8 + 4;
    for (value, named) in
        [(0u64, "overlap"), (33, "not a multiple of the alignment"), (1 << 50, "does not end")]
    {
        let mut bytes = bytes.clone();
        bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        let error = open(&bytes).unwrap_err();
        assert!(error.contains(named) && error.contains("\"matrix\""), "{error}");
    }
    for alignment in [0, 24] {
        let mut gguf = small();
        gguf.set("general.alignment", Value::U32(alignment));
        assert!(open(&gguf.bytes()).unwrap_err().contains("not a power of two"));
    }
}

#[test]
fn a_type_that_cannot_be_decoded_is_named_when_it_is_asked_for() {
    for (kind, name) in [(20, "IQ4_NL"), (4711, "ggml type 4711")] {
        let mut gguf = small();
        gguf.tensor("matrix").kind = kind;
        let file = open(&gguf.bytes()).unwrap();
        let error = file.tensor("matrix").unwrap().block_type(Path::new("m.gguf")).unwrap_err().to_string();
        assert!(
            error.contains("tensor \"matrix\"") && error.contains(name) && error.contains("Q4_K"),
            "{error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn damaged_files_open_or_give_an_error_but_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = small().bytes();
        for (index, value) in changes {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        if let Ok(file) = open(&bytes) {
            for tensor in file.tensors() {
                if let Ok(block) = tensor.block_type(file.path()) {
                    block.decode(tensor.data, &mut vec![0.0; tensor.elements()]);
                }
            }
        }
    }
}
