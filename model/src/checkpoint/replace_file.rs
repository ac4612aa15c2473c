//! Writes one file of a directory that is there already: the new contents completely, or the old ones.

use std::fs::{File, Permissions};
use std::io::Write;
use std::path::Path;

use crate::error::CheckpointError;

/// Writes `contents` to `directory/name` through a temporary file, flushed and renamed.
///
/// # Errors
/// When the disk refuses; what was there before is there still.
pub fn replace_file(directory: &Path, name: &str, contents: &[u8]) -> Result<(), CheckpointError> {
    let path = directory.join(name);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".nibble-");
    // A temporary file is private by default; this is an ordinary file.
    #[cfg(unix)]
    builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    let mut file =
        builder.tempfile_in(directory).map_err(CheckpointError::io("create a file in", directory))?;
    file.write_all(contents).map_err(CheckpointError::io("write", &path))?;
    file.as_file().sync_all().map_err(CheckpointError::io("flush", &path))?;
    file.persist(&path).map_err(|error| CheckpointError::io("rename to", &path)(error.error))?;
    sync_directory(directory)
}

/// Makes the names in `directory` survive a power cut.
pub(super) fn sync_directory(directory: &Path) -> Result<(), CheckpointError> {
    File::open(directory)
        .and_then(|handle| handle.sync_all())
        .map_err(CheckpointError::io("flush", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        replace_file(directory.path(), "a", b"first").unwrap();
        replace_file(directory.path(), "a", b"second").unwrap();
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let missing = replace_file(&directory.path().join("missing"), "a", b"").unwrap_err().to_string();
        assert!(missing.contains("cannot create a file in") && missing.contains("missing"), "{missing}");
    }
}
