//! Writes the tiny models into a directory, for `tests/golden/tiny_models.py`.

use std::path::PathBuf;

use nibble_tests::tiny_model::{TINY_MODELS, tokens};
use serde_json::json;

fn main() {
    let root = PathBuf::from(std::env::args().nth(1).expect("usage: write_tiny_models DIR"));
    for (index, model) in TINY_MODELS.iter().enumerate() {
        let directory = root.join(index.to_string());
        std::fs::create_dir_all(&directory).expect("the directory can be created");
        model.write(&directory);
        let description = json!({ "name": model.name, "tokens": tokens(256, 5) });
        let file = directory.join("tiny_model.json");
        std::fs::write(file, description.to_string()).expect("the file can be written");
    }
}
