//! API keys: a request without a known one is refused, whatever it asks for.
//!
//! Keys are kept and compared as SHA-256 digests, every one of them for every request: neither the time nor a memory
//! dump tells a key or its length.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::app::AppState;
use crate::openai::error::ApiError;

/// The tenant of requests to a server without keys.
const DEFAULT_TENANT: &str = "default";
/// Longest name of a tenant.
const MAXIMUM_NAME_BYTES: usize = 64;

/// Whose a request is: the name of its key. In the extensions of every request that passed [`require_key`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant(pub Arc<str>);

/// Why keys cannot be used. Never holds a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("{}: the API keys cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file has no key.
    #[error("{}: the file holds no API key, expected one on each line, as KEY or NAME:KEY", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A key is malformed.
    #[error("{place}: {problem}")]
    Key {
        /// The line, or the option.
        place: String,
        /// What is wrong, and what is expected.
        problem: String,
    },
}

/// A key that lets requests in.
#[derive(Clone)]
struct Key {
    digest: [u8; 32],
    tenant: Arc<str>,
}

impl Key {
    fn new(key: &[u8], tenant: &str) -> Self {
        Self { digest: Sha256::digest(key).into(), tenant: tenant.into() }
    }
}

/// The keys of a server: those it was started with, and those of a file, which can be read again.
#[derive(Default)]
pub struct ApiKeys {
    given: Vec<Key>,
    file: Option<PathBuf>,
    current: RwLock<Arc<[Key]>>,
}

/// Tells how many keys there are, never one of them.
impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ApiKeys").field("keys", &self.current().len()).finish_non_exhaustive()
    }
}

impl ApiKeys {
    /// The keys `given` and those of `file`, which has one on each line, as `KEY` or `NAME:KEY`; blank lines and
    /// lines that begin with `#` are ignored. The name of a key is its tenant; keys without one are called `key-1`,
    /// `key-2`, and so on, in their order. Without any key everybody is let in.
    ///
    /// # Errors
    /// When the file cannot be read or holds no key, or a key is empty or there twice.
    pub fn new(given: &[String], file: Option<&Path>) -> Result<Self, KeyError> {
        let named = |(at, key): (usize, &String)| Key::new(key.as_bytes(), &format!("key-{}", at + 1));
        if given.iter().any(String::is_empty) {
            let problem = "an API key is empty, expected at least one character".to_owned();
            return Err(KeyError::Key { place: "--api-key".to_owned(), problem });
        }
        let given: Vec<Key> = given.iter().enumerate().map(named).collect();
        let keys = Self { given, file: file.map(Path::to_owned), current: RwLock::default() };
        keys.reload()?;
        Ok(keys)
    }

    /// Reads the file again; returns how many keys there are now. After an error the keys are as before.
    ///
    /// # Errors
    /// As [`ApiKeys::new`].
    pub fn reload(&self) -> Result<usize, KeyError> {
        let mut keys = self.given.clone();
        if let Some(path) = &self.file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| KeyError::Read { path: path.clone(), source })?;
            read_keys(path, &text, &mut keys)?;
        }
        let count = keys.len();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = keys.into();
        Ok(count)
    }

    /// Whether there is no key, so that everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.current().is_empty()
    }

    /// Whose `key` is; `None` for a wrong one. Takes the same time whichever key it is, if any.
    pub(crate) fn tenant(&self, key: &[u8]) -> Option<Tenant> {
        let keys = self.current();
        if keys.is_empty() {
            return Some(Tenant(DEFAULT_TENANT.into()));
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        let mut found = u32::MAX;
        for (at, key) in (0..).zip(keys.iter()) {
            found.conditional_assign(&at, key.digest.ct_eq(&digest));
        }
        keys.get(found as usize).map(|key| Tenant(Arc::clone(&key.tenant)))
    }

    fn current(&self) -> Arc<[Key]> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Appends the keys of the file `path`, which holds `text`.
fn read_keys(path: &Path, text: &str, keys: &mut Vec<Key>) -> Result<(), KeyError> {
    let before = keys.len();
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    for (line, content) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let error =
            |problem: String| KeyError::Key { place: format!("{}: line {line}", path.display()), problem };
        let (name, key) = match content.split_once(':') {
            Some((name, key)) => (name.trim().to_owned(), key.trim()),
            None => (format!("key-{}", keys.len() + 1), content),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        // The name is not shown: it may be the beginning of a key.
        if name.is_empty() || name.len() > MAXIMUM_NAME_BYTES || !name.bytes().all(plain) {
            let expected = format!("1 to {MAXIMUM_NAME_BYTES} letters, digits, \"-\", \"_\" and \".\"");
            return Err(error(format!("the name before the \":\" is malformed, expected {expected}")));
        }
        if key.is_empty() {
            return Err(error(format!("the key of {name} is empty, expected NAME:KEY")));
        }
        let key = Key::new(key.as_bytes(), &name);
        if let Some(other) = keys.iter().find(|other| other.digest == key.digest) {
            return Err(error(format!(
                "the key of {name} is that of {} too, expected another",
                other.tenant
            )));
        }
        keys.push(key);
    }
    if keys.len() == before {
        return Err(KeyError::NoKey { path: path.to_owned() });
    }
    Ok(())
}

/// Lets requests with a key pass, as those of its tenant.
pub(crate) async fn require_key(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let header = request.headers().get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let key = header.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let tenant = state.options.api_keys.tenant(key.map_or(&b""[..], |(_, key)| key));
    request.extensions_mut().insert(tenant.ok_or(ApiError::Unauthorized)?);
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    fn tenant(keys: &ApiKeys, key: &str) -> Option<String> {
        keys.tenant(key.as_bytes()).map(|Tenant(name)| name.to_string())
    }

    #[test]
    fn every_key_has_its_tenant() {
        let (_directory, path) = file("# ours\n\nteam-a: first\nsecond\n  b:with:colon  \n");
        let keys = ApiKeys::new(&["given".to_owned()], Some(&path)).unwrap();
        for (key, expected) in [
            ("given", Some("key-1")),
            ("first", Some("team-a")),
            ("second", Some("key-3")),
            ("with:colon", Some("b")),
            ("# ours", None),
            ("team-a", None),
            ("", None),
            ("giveN", None),
        ] {
            assert_eq!(tenant(&keys, key).as_deref(), expected, "{key}");
        }
    }

    #[test]
    fn without_keys_everybody_is_the_default_tenant() {
        let keys = ApiKeys::new(&[], None).unwrap();
        assert_eq!(tenant(&keys, "anything").as_deref(), Some("default"));
    }

    #[test]
    fn a_file_that_was_changed_is_read_again_and_a_bad_one_changes_nothing() {
        let (_directory, path) = file("old");
        let keys = ApiKeys::new(&[], Some(&path)).unwrap();
        std::fs::write(&path, "a:new\nb:newer").unwrap();
        assert_eq!(keys.reload().unwrap(), 2);
        assert_eq!((tenant(&keys, "old"), tenant(&keys, "new").as_deref()), (None, Some("a")));
        for bad in ["", "# nothing\n", ":key", "a:", "a b:c", "a:x\nb:x"] {
            std::fs::write(&path, bad).unwrap();
            assert!(keys.reload().is_err(), "{bad:?}");
            assert_eq!(tenant(&keys, "newer").as_deref(), Some("b"));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(keys.reload().unwrap_err().to_string().contains("keys"));
        assert_eq!(tenant(&keys, "newer").as_deref(), Some("b"));
    }

    #[test]
    fn no_message_tells_a_key() {
        let (_directory, path) = file("a:secret\nsecret");
        let message = ApiKeys::new(&[], Some(&path)).unwrap_err().to_string();
        assert!(message.contains("line 2") && !message.contains("secret"), "{message}");
        let (_directory, path) = file("sec ret:x");
        let message = ApiKeys::new(&[], Some(&path)).unwrap_err().to_string();
        assert!(message.contains("line 1") && !message.contains("sec"), "{message}");
        let keys = ApiKeys::new(&["secret".to_owned()], None).unwrap();
        assert_eq!(format!("{keys:?}"), "ApiKeys { keys: 1, .. }");
    }
}
