//! Faults planted in kernel sources, to see whether the tests would catch them.

/// A change of one place of a kernel's source that makes it wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// The operation's name, [`Source::name`](nibble_kernels::device::cuda::driver::Source::name).
    pub source: &'static str,
    /// What is wrong, in a few words.
    pub fault: &'static str,
    /// The text that is replaced; it must occur.
    pub pattern: &'static str,
    /// Which of its occurrences, from 0.
    pub occurrence: usize,
    /// The text in its place.
    pub replacement: &'static str,
}

impl Mutation {
    /// The source with the fault.
    ///
    /// # Errors
    /// When the pattern does not occur as often: the source has changed and the table must follow it.
    pub fn apply(&self, text: &str) -> Result<String, String> {
        let Some((start, _)) = text.match_indices(self.pattern).nth(self.occurrence) else {
            return Err(format!(
                "{} does not have occurrence {} of {:?}, where \"{}\" was to be planted",
                self.source, self.occurrence, self.pattern, self.fault
            ));
        };
        let end = start + self.pattern.len();
        Ok(format!("{}{}{}", &text[..start], self.replacement, &text[end..]))
    }
}
