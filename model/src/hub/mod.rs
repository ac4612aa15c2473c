//! From what a user calls a model to a directory: a path, or a Hugging Face id that is fetched into the usual cache.
//!
//! ```text
//! CACHE/models--ORGANIZATION--NAME/refs/main           commit
//! CACHE/models--ORGANIZATION--NAME/snapshots/COMMIT/   links to ../../blobs, this is the directory
//! ```
//!
//! Other Hugging Face programs share the cache. Only what a checkpoint is read from is fetched: config.json and the
//! other small files below, and either model.safetensors or the index and its files. With the network down, a
//! complete snapshot of the cache is used as it is.

mod reference;

use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
pub use reference::ModelReference;

use crate::checkpoint::{self, INDEX_FILE, SINGLE_FILE};
use crate::error::CheckpointError;

/// The small files of a model that are read; only the first must be there.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];
const RETRIES: usize = 3;

/// Where models are fetched from and to.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// The address, such as `https://huggingface.co`.
    pub endpoint: String,
    /// The directory that holds `models--ORGANIZATION--NAME`.
    pub cache: PathBuf,
    /// The access token, for models that need one.
    pub token: Option<String>,
    /// Use what is in the cache and nothing else.
    pub offline: bool,
}

/// How far the download of one file is.
#[derive(Clone, Copy, Debug)]
pub struct DownloadProgress<'a> {
    /// The file.
    pub file: &'a str,
    /// Bytes that are here.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes: u64,
}

/// The directory of the Hugging Face model `id`, fetched if it is not in the cache.
///
/// # Errors
/// Names the id and the file that cannot be had, and what to do.
pub fn fetch(
    id: &str,
    settings: &HubSettings,
    progress: &mut dyn FnMut(DownloadProgress<'_>),
) -> Result<PathBuf, CheckpointError> {
    let hub = Hub { id, settings, repo: Repo::new(id.to_owned(), RepoType::Model) };
    if settings.offline {
        return hub.cached().ok_or_else(|| {
            let problem =
                format!("not complete in the cache {}, and HF_HUB_OFFLINE is set", settings.cache.display());
            hub.error("config.json", problem, "unset HF_HUB_OFFLINE or fetch it on another machine")
        });
    }
    let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.trim_end_matches('/').to_owned())
        .with_token(settings.token.clone())
        .with_retries(RETRIES)
        .build()
        .map_err(|error| hub.failed("config.json", error))?
        .repo(hub.repo.clone());
    let listing = match api.info() {
        Ok(info) => info,
        Err(error) => {
            let failed = hub.failed("its list of files", error);
            return match hub.cached() {
                Some(directory) if matches!(failed, Failure::Network(_)) => {
                    tracing::warn!("{}; using {}", CheckpointError::from(failed), directory.display());
                    Ok(directory)
                }
                _ => Err(failed.into()),
            };
        }
    };
    let names: Vec<&str> = listing.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
    let directory = hub.snapshot(&listing.sha).ok_or_else(|| {
        hub.error("its list of files", format!("the commit is {:?}", listing.sha), "check HF_ENDPOINT")
    })?;
    let mut get = |file: &str| hub.get(&api, &directory, file, progress);
    for file in SMALL_FILES {
        if names.contains(&file) || file == SMALL_FILES[0] {
            get(file)?;
        }
    }
    if names.contains(&SINGLE_FILE) {
        get(SINGLE_FILE)?;
    } else if names.contains(&INDEX_FILE) {
        get(INDEX_FILE)?;
        for file in checkpoint::indexed_files(&directory.join(INDEX_FILE))? {
            get(&file.file_name().unwrap_or_default().to_string_lossy())?;
        }
    } else {
        let help = match names.iter().find(|name| name.ends_with(".gguf")) {
            Some(file) => format!("download {file} from it and name that file"),
            None => "choose a model with safetensors weights".to_owned(),
        };
        return Err(hub.error(
            SINGLE_FILE,
            "the model does not have it, nor an index of several".to_owned(),
            &help,
        ));
    }
    Cache::new(settings.cache.clone())
        .repo(hub.repo.clone())
        .create_ref(&listing.sha)
        .map_err(CheckpointError::io("write the reference in", &settings.cache))?;
    Ok(directory)
}

/// One model on the hub.
struct Hub<'a> {
    id: &'a str,
    settings: &'a HubSettings,
    repo: Repo,
}

/// Why something could not be fetched.
enum Failure {
    /// Nobody answered.
    Network(CheckpointError),
    /// The answer was no, or made no sense.
    Answer(CheckpointError),
}

impl From<Failure> for CheckpointError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Network(error) | Failure::Answer(error) => error,
        }
    }
}

impl Hub<'_> {
    /// The directory of a commit. Commits are hexadecimal; nothing else becomes a part of a path.
    fn snapshot(&self, commit: &str) -> Option<PathBuf> {
        let plain = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric());
        plain.then(|| self.settings.cache.join(self.repo.folder_name()).join("snapshots").join(commit))
    }

    /// The directory in the cache, if everything is there.
    fn cached(&self) -> Option<PathBuf> {
        let cache = Cache::new(self.settings.cache.clone()).repo(self.repo.clone());
        let config = cache.get(SMALL_FILES[0])?;
        let directory = config.parent()?;
        let complete = directory.join(SINGLE_FILE).exists()
            || checkpoint::indexed_files(&directory.join(INDEX_FILE))
                .is_ok_and(|files| files.iter().all(|file| file.exists()));
        complete.then(|| directory.to_owned())
    }

    /// Fetches `file` into `directory`, if it is not there.
    fn get(
        &self,
        api: &ApiRepo,
        directory: &Path,
        file: &str,
        progress: &mut dyn FnMut(DownloadProgress<'_>),
    ) -> Result<(), CheckpointError> {
        if directory.join(file).exists() {
            return Ok(());
        }
        let progress = FileProgress { callback: progress, file: String::new(), done: 0, total: 0 };
        let path = api.download_with_progress(file, progress).map_err(|error| self.failed(file, error))?;
        if path.parent() == Some(directory) {
            return Ok(());
        }
        let problem = "the model was changed while it was fetched".to_owned();
        Err(self.error(file, problem, "run the command again"))
    }

    fn error(&self, file: &str, problem: String, help: &str) -> CheckpointError {
        CheckpointError::Download {
            model: self.id.to_owned(),
            file: file.to_owned(),
            problem,
            help: help.to_owned(),
        }
    }

    fn failed(&self, file: &str, error: ApiError) -> Failure {
        let text = error.to_string();
        let endpoint = &self.settings.endpoint;
        let status = match error {
            ApiError::RequestError(error) => match error.into_response() {
                Some(response) => response.status(),
                None => {
                    let help = format!("check the network, or HF_ENDPOINT, which is {endpoint}");
                    return Failure::Network(self.error(file, text, &help));
                }
            },
            _ => 0,
        };
        let help = match status {
            401 | 403 => format!(
                "check the id; if the model asks for it, accept its terms at {endpoint}/{} and set HF_TOKEN",
                self.id
            ),
            404 => "check the id and the path: there is no such directory either".to_owned(),
            _ => "run the command again: it goes on where it stopped".to_owned(),
        };
        Failure::Answer(self.error(file, text, &help))
    }
}

/// Passes on what the client reports.
struct FileProgress<'a> {
    callback: &'a mut dyn FnMut(DownloadProgress<'_>),
    file: String,
    done: u64,
    total: u64,
}

impl FileProgress<'_> {
    fn report(&mut self) {
        (self.callback)(DownloadProgress { file: &self.file, bytes_done: self.done, bytes: self.total });
    }
}

impl Progress for FileProgress<'_> {
    fn init(&mut self, size: usize, file: &str) {
        file.clone_into(&mut self.file);
        (self.done, self.total) = (0, size as u64);
        self.report();
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.report();
    }

    fn finish(&mut self) {}
}
