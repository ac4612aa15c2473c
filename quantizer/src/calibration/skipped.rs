//! Which samples were skipped, and why.

use std::fmt::{self, Display};
use std::path::Path;

use super::files::Place;

/// How many are named; of the rest there is the number.
const NAMED: usize = 5;

/// Samples that cannot be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    count: usize,
    named: Vec<String>,
}

impl Skipped {
    /// Adds a file, or the sample at a place of it.
    pub(super) fn add(&mut self, file: &Path, place: Option<Place>, reason: String) {
        self.count += 1;
        if self.named.len() < NAMED {
            let place = place.map(|place| format!(" {place}")).unwrap_or_default();
            self.named.push(format!("{}{place}: {reason}", file.display()));
        }
    }

    /// Adds those of another file.
    pub(super) fn append(&mut self, other: Self) {
        self.count += other.count;
        let room = NAMED - self.named.len();
        self.named.extend(other.named.into_iter().take(room));
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }
}

impl Display for Skipped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.named.join("; "))?;
        match self.count - self.named.len() {
            0 => Ok(()),
            more => write!(formatter, "; and {more} more"),
        }
    }
}
