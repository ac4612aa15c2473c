//! What a command calls MODEL, found: the environment variables of Hugging Face programs, and the download bar.

use std::env;
use std::path::PathBuf;

use nibble_model::hub::{HubSettings, ModelReference, fetch};

use crate::output::Progress;

const ENDPOINT: &str = "https://huggingface.co";

/// The directory or the GGUF file of MODEL.
pub(crate) fn model_path(model: &str) -> anyhow::Result<PathBuf> {
    match ModelReference::parse(model)? {
        ModelReference::Directory(path) | ModelReference::Gguf(path) => Ok(path),
        ModelReference::HubId(id) => fetch_model(&id),
    }
}

/// The directory of MODEL, for what a GGUF file does not do for.
pub(crate) fn model_directory(model: &str) -> anyhow::Result<PathBuf> {
    let path = model_path(model)?;
    anyhow::ensure!(
        !path.is_file(),
        "{} is a GGUF file, and this takes a model directory; run first: nibble import {} {}",
        path.display(),
        path.display(),
        path.with_extension("").display()
    );
    Ok(path)
}

fn fetch_model(id: &str) -> anyhow::Result<PathBuf> {
    let settings = settings_from_environment()?;
    let mut bar: Option<(String, Progress)> = None;
    Ok(fetch(id, &settings, &mut |progress| {
        let (_, bar) = match &mut bar {
            Some(current) if current.0 == progress.file => current,
            other => other.insert((
                progress.file.to_owned(),
                Progress::new(format!("fetching {id} {}", progress.file)),
            )),
        };
        bar.update(progress.bytes_done, progress.bytes, "bytes");
    })?)
}

/// `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE`, as huggingface_hub understands them.
fn settings_from_environment() -> anyhow::Result<HubSettings> {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let home = variable("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| PathBuf::from(cache).join("huggingface")))
        .or_else(|| Some(env::home_dir()?.join(".cache/huggingface")));
    let cache = variable("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
    let token_file = home.as_ref().and_then(|home| std::fs::read_to_string(home.join("token")).ok());
    let token = variable("HF_TOKEN").or(token_file);
    Ok(HubSettings {
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
        cache: cache.ok_or_else(|| {
            anyhow::anyhow!("there is no home directory for the cache of models; set HF_HOME")
        })?,
        token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
        offline: variable("HF_HUB_OFFLINE")
            .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on")),
    })
}
