//! Which modules a rule of a quantization config is about.
//!
//! Expressions are Python's: matched from the start of the module's name, not to its end; look-around included.

use fancy_regex::Regex;
use serde::{Serialize, Serializer};

use crate::config::Fields;
use crate::error::CheckpointError;

/// The class that every linear layer of a model has, as PyTorch calls it.
pub(super) const LINEAR_CLASS: &str = "Linear";

/// Modules by name or by class.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ModulePattern {
    /// The one of this name, or all of this class.
    Name(String),
    /// Those whose name begins as the expression says.
    Expression(Expression),
}

/// A regular expression that is matched from the start of a name, as Python's `re.match` does.
#[derive(Clone, Debug)]
pub struct Expression {
    source: String,
    regex: Regex,
}

/// How a pattern found a module; the closest match decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Closeness {
    /// By its own name.
    Name,
    /// By an expression.
    Expression,
    /// By its class.
    Class,
}

impl ModulePattern {
    /// `re:EXPRESSION`, a name, or a class, as compressed-tensors writes them in the field `name`.
    pub(super) fn parse(fields: &Fields, name: &str, text: &str) -> Result<Self, CheckpointError> {
        match text.strip_prefix("re:") {
            Some(source) => Expression::parse(fields, name, source).map(Self::Expression),
            None => Ok(Self::Name(text.to_owned())),
        }
    }

    /// How it matches the linear layer `module`, if it does.
    pub(super) fn find(&self, module: &str) -> Option<Closeness> {
        match self {
            Self::Name(name) if name == module => Some(Closeness::Name),
            Self::Name(name) => (name == LINEAR_CLASS).then_some(Closeness::Class),
            Self::Expression(expression) => expression.matches(module).then_some(Closeness::Expression),
        }
    }

    /// The text that [`parse`](Self::parse) read.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Name(name) => name.clone(),
            Self::Expression(expression) => format!("re:{}", expression.source()),
        }
    }
}

impl Expression {
    /// The expression `source` of the field `name`.
    pub(super) fn parse(fields: &Fields, name: &str, source: &str) -> Result<Self, CheckpointError> {
        Self::new(source).map_err(|error| {
            let expected = format!("a regular expression ({error})");
            fields.mismatch(name, format!("\"{source}\""), expected)
        })
    }

    /// The expression `source`.
    ///
    /// # Errors
    /// When it is not a regular expression.
    pub fn new(source: &str) -> Result<Self, fancy_regex::Error> {
        // \A rather than a search from the start: alternatives of `source` must all be tied to it.
        let regex = Regex::new(&format!(r"\A(?:{source})"))?;
        Ok(Self { source: source.to_owned(), regex })
    }

    /// Whether `module` begins so. An expression that backtracks without end matches nothing.
    pub fn matches(&self, module: &str) -> bool {
        self.regex.is_match(module).unwrap_or_else(|error| {
            tracing::warn!(expression = self.source, module, %error, "given up; taken as no match");
            false
        })
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl Serialize for Expression {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.source)
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_tied_to_the_start_and_not_to_the_end() {
        let matches = |source: &str, module: &str| Expression::new(source).unwrap().matches(module);
        assert!(matches(r"model\.layers\.1", "model.layers.12.mlp.up_proj"));
        assert!(!matches(r"layers", "model.layers.12.mlp.up_proj"));
        assert!(!matches(r"lm_head|mlp", "model.layers.12.mlp.up_proj"));
        assert!(matches(r"(?!.*down_proj).*mlp", "model.layers.12.mlp.up_proj"));
        assert!(!matches(r"(?!.*down_proj).*mlp", "model.layers.12.mlp.down_proj"));
    }

    #[test]
    fn an_expression_without_end_matches_nothing() {
        let expression = Expression::new(r"(?=(a+)+\1$)(a|aa)+$b").unwrap();
        assert!(!expression.matches(&"a".repeat(200)));
    }
}
