//! One tool call as models write it, `{"name": "f", "arguments": {...}}`, character by character.
//!
//! The name is known as soon as its string ends; from then on the text of the arguments is handed out as it
//! comes, as the model wrote it. Some models say `parameters` instead of `arguments`, put them before the name, or
//! write them as a string that holds JSON: all of that comes out the same.

/// Keys of a call. The object of a model's answer in JSON has others.
const KEYS: [&str; 5] = ["name", "arguments", "parameters", "type", "id"];

/// Reads one call.
#[derive(Debug)]
pub(super) struct CallReader {
    state: State,
    /// The key or the value that is being read, or what the value of `arguments` has before the name is known.
    text: String,
    name_is_known: bool,
    arguments: Arguments,
}

#[derive(Debug)]
enum State {
    BeforeObject,
    /// Before a key, a comma or the end.
    BeforeKey,
    Key(Nesting),
    AfterKey(Key),
    Value(Key, Nesting),
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    Other,
}

/// The arguments so far.
#[derive(Debug, Default)]
enum Arguments {
    /// Not there yet.
    #[default]
    Missing,
    /// Read before the name.
    Held(String),
    /// Handed out, at least their beginning.
    Sent,
}

/// Where in a JSON value the reader is.
#[derive(Clone, Copy, Debug, Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// What a character or more of them brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallDelta {
    /// The name of the function, in the first delta of a call.
    pub(crate) name: Option<String>,
    /// Text that follows the text of the arguments before.
    pub(crate) arguments: String,
}

/// Where a reader is after a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// In the call.
    Inside,
    /// The character ended the call.
    Ended,
    /// The text is no call, as of this character.
    Malformed,
}

impl Nesting {
    /// Takes a character of a value; whether the value ends with it. `None` if it cannot be there.
    fn take(&mut self, character: char) -> Option<bool> {
        if self.in_string {
            match character {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return Some(!self.in_string && self.depth == 0);
        }
        match character {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.checked_sub(1)?;
                return Some(self.depth == 0);
            }
            ',' | ':' | '+' | '-' | '.' => {}
            _ if character.is_ascii_alphanumeric() || is_space(character) => {}
            _ => return None,
        }
        Some(false)
    }

    /// Whether a number or a word ends before `character`.
    fn ends_before(&self, character: char) -> bool {
        self.depth == 0 && !self.in_string && (matches!(character, ',' | '}' | ']') || is_space(character))
    }
}

fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\n' | '\r' | '\t')
}

impl CallReader {
    pub(super) fn new() -> Self {
        let arguments = Arguments::default();
        Self { state: State::BeforeObject, text: String::new(), name_is_known: false, arguments }
    }

    /// Whether the name was handed out.
    pub(super) fn name_is_known(&self) -> bool {
        self.name_is_known
    }

    /// Takes the next character; what it brings is added to `delta`.
    pub(super) fn push(&mut self, character: char, delta: &mut CallDelta) -> Progress {
        match &mut self.state {
            State::BeforeObject => match character {
                '{' => self.state = State::BeforeKey,
                _ if is_space(character) => {}
                _ => return Progress::Malformed,
            },
            State::BeforeKey => match character {
                '"' => {
                    self.text = character.to_string();
                    self.state = State::Key(Nesting { in_string: true, ..Nesting::default() });
                }
                '}' => return self.end(delta),
                _ if character == ',' || is_space(character) => {}
                _ => return Progress::Malformed,
            },
            State::Key(nesting) => {
                self.text.push(character);
                if nesting.take(character) == Some(true) {
                    let key = serde_json::from_str::<String>(&self.text).unwrap_or_default();
                    if !self.name_is_known && !KEYS.contains(&key.as_str()) {
                        return Progress::Malformed;
                    }
                    self.state = State::AfterKey(match key.as_str() {
                        "name" => Key::Name,
                        "arguments" | "parameters" => Key::Arguments,
                        _ => Key::Other,
                    });
                }
            }
            State::AfterKey(key) => match character {
                ':' => {
                    self.text.clear();
                    self.state = State::Value(*key, Nesting::default());
                }
                _ if is_space(character) => {}
                _ => return Progress::Malformed,
            },
            State::Value(key, nesting) => {
                let key = *key;
                if self.text.is_empty() && is_space(character) {
                    return Progress::Inside;
                }
                if !self.text.is_empty() && nesting.ends_before(character) {
                    let progress = self.end_value(key, delta);
                    return if progress == Progress::Inside { self.push(character, delta) } else { progress };
                }
                let Some(ends) = nesting.take(character) else { return Progress::Malformed };
                self.text.push(character);
                if key == Key::Arguments && self.name_is_known && self.text.starts_with('{') {
                    // The text stays, as the sign that the value has begun, but only its first character.
                    self.text.truncate(1);
                    self.arguments = Arguments::Sent;
                    delta.arguments.push(character);
                }
                if ends {
                    return self.end_value(key, delta);
                }
            }
            State::End => return Progress::Malformed,
        }
        Progress::Inside
    }

    fn end_value(&mut self, key: Key, delta: &mut CallDelta) -> Progress {
        self.state = State::BeforeKey;
        match key {
            Key::Other => {}
            Key::Name => {
                let Ok(name) = serde_json::from_str(&self.text) else { return Progress::Malformed };
                if self.name_is_known {
                    return Progress::Malformed;
                }
                self.name_is_known = true;
                delta.name = Some(name);
                if let Arguments::Held(arguments) = std::mem::take(&mut self.arguments) {
                    delta.arguments.push_str(&arguments);
                    self.arguments = Arguments::Sent;
                }
            }
            Key::Arguments => {
                if let Arguments::Sent = self.arguments {
                    return Progress::Inside;
                }
                let arguments = match serde_json::from_str(&self.text) {
                    Ok(serde_json::Value::String(text)) => text,
                    Ok(serde_json::Value::Null) => return Progress::Inside,
                    _ => std::mem::take(&mut self.text),
                };
                if self.name_is_known {
                    delta.arguments.push_str(&arguments);
                    self.arguments = Arguments::Sent;
                } else {
                    self.arguments = Arguments::Held(arguments);
                }
            }
        }
        Progress::Inside
    }

    fn end(&mut self, delta: &mut CallDelta) -> Progress {
        if !self.name_is_known {
            return Progress::Malformed;
        }
        if !matches!(self.arguments, Arguments::Sent) {
            delta.arguments.push_str("{}");
        }
        self.state = State::End;
        Progress::Ended
    }
}
