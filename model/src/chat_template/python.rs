//! What Jinja templates of Hugging Face models expect of Python: methods, spelling of values, `json.dumps`,
//! `datetime.now().strftime`.

use std::fmt::Write as _;
use std::io;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Spaces of an indentation that `tojson` accepts at most.
const MAXIMUM_INDENT: usize = 16;

/// Gives `environment` the functions, filters and methods.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(print);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| str_of(value));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
}

/// What a template says by `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The message of `raise_exception`, when that is where `error` comes from.
pub(super) fn raised_message(error: &Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // Only a format that chrono does not know makes this fail.
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format {format:?}"))
    })?;
    Ok(text)
}

/// Prints a value of `{{ value }}` as Python's `str` spells it.
fn print(output: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    output.write_str(&str_of(value)).map_err(Error::from)
}

/// Python's `str(value)`; an undefined value is empty.
fn str_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => {
            let mut text = String::new();
            write_repr(&mut text, value);
            text
        }
    }
}

/// Python's `repr(value)`.
fn write_repr(text: &mut String, value: &Value) {
    match value.kind() {
        ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => text.push_str(&float_repr(number)),
            Err(_) => text.push_str(&value.to_string()),
        },
        ValueKind::String => write_string_repr(text, &value.to_string()),
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(text, &item);
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(text, &key);
                text.push_str(": ");
                write_repr(text, &value.get_item(&key).unwrap_or_default());
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
}

fn write_string_repr(text: &mut String, value: &str) {
    let quote = if value.contains('\'') && !value.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            character if character == quote => text.extend(['\\', quote]),
            character if character.is_ascii_control() => {
                text.push_str(&format!("\\x{:02x}", character as u32));
            }
            character => text.push(character),
        }
    }
    text.push(quote);
}

/// Python's `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from
/// 1e16 on.
fn float_repr(number: f64) -> String {
    if !number.is_finite() {
        let name = if number.is_nan() { "nan" } else { "inf" };
        return if number < 0.0 { format!("-{name}") } else { name.to_owned() };
    }
    let scientific = format!("{number:e}");
    let exponent =
        scientific.split_once('e').and_then(|(_, exponent)| exponent.parse::<i32>().ok()).unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{number:?}");
    }
    let digits = scientific.split('e').next().unwrap_or_default();
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)` with the defaults of transformers.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let invalid = |message: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {message}"));
    if indent.is_some_and(|indent| indent > MAXIMUM_INDENT) {
        return Err(invalid("indent is too large"));
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators is not a pair")),
        // Python leaves out the space where a line ends anyway.
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let mut json = serde_json::to_value(value)
        .map_err(|error| invalid("the value has no JSON form").with_source(error))?;
    if sort_keys {
        json.sort_all_objects();
    }
    let spaces = " ".repeat(indent.unwrap_or(0));
    let pretty = indent.map(|_| PrettyFormatter::with_indent(spaces.as_bytes()));
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, Dumps { item, key, ensure_ascii, pretty });
    json.serialize(&mut serializer).map_err(|error| invalid("cannot write JSON").with_source(error))?;
    let text = String::from_utf8(bytes).map_err(|error| invalid("not UTF-8").with_source(error))?;
    Ok(Value::from_safe_string(text))
}

/// Writes JSON as Python's `json.dumps`.
struct Dumps<'a> {
    /// Between items.
    item: String,
    /// Between a key and its value.
    key: String,
    ensure_ascii: bool,
    /// Line breaks and indentation, when `indent` is given.
    pretty: Option<PrettyFormatter<'a>>,
}

impl Dumps<'_> {
    fn separate<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
        begin: impl FnOnce(&mut PrettyFormatter<'_>, &mut Vec<u8>) -> io::Result<()>,
    ) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        let Some(pretty) = &mut self.pretty else { return Ok(()) };
        // The comma that serde_json writes before the line break is written already.
        let mut line = Vec::new();
        begin(pretty, &mut line)?;
        writer.write_all(line.strip_prefix(b",").unwrap_or(&line))
    }
}

macro_rules! delegate_brackets {
    ($($method:ident: $bracket:literal),*) => {$(
        fn $method<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
            match &mut self.pretty {
                Some(pretty) => pretty.$method(writer),
                None => writer.write_all($bracket),
            }
        }
    )*};
}

impl Formatter for Dumps<'_> {
    delegate_brackets!(begin_array: b"[", end_array: b"]", begin_object: b"{", end_object: b"}");

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first, |pretty, line| pretty.begin_array_value(line, first))
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.end_array_value(writer))
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first, |pretty, line| pretty.begin_object_key(line, first))
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.end_object_value(writer))
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float_repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
                continue;
            }
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}
