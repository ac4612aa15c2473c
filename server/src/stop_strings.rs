//! Stop strings in a text that comes in pieces.

/// Finds the first stop string of a text, however the text is cut into pieces, and keeps back what may be
/// the beginning of one.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// Whether the stop string itself belongs to the text.
    include: bool,
    /// The end of the text so far, as far as a stop string may begin in it.
    held: String,
}

/// What a piece of text brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No stop string yet; this much of the text is certain.
    Text(String),
    /// The text ends with this; the stop string is the second.
    Stop(String, String),
}

impl StopStrings {
    /// A matcher at the beginning of a text. No stop string may be empty.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Found {
        if self.stops.is_empty() {
            return Found::Text(piece.to_owned());
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_stop() {
            let end = if self.include { start + stop.len() } else { start };
            let stop = stop.to_owned();
            self.held.truncate(end);
            return Found::Stop(std::mem::take(&mut self.held), stop);
        }
        let uncertain = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - uncertain);
        Found::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text that was kept back, when no more comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop string that ends first begins; of several that end there, the longest.
    fn first_stop(&self) -> Option<(usize, &str)> {
        self.stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start, stop.as_str())))
            .min_by_key(|&(start, stop)| (start + stop.len(), start))
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`, most first.
fn begun(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(length, _)| length).rev();
    lengths.into_iter().find(|&length| text.ends_with(&stop[..length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut matcher = StopStrings::new(stops.iter().map(ToString::to_string).collect(), include);
        let mut texts = Vec::new();
        for piece in pieces {
            match matcher.push(piece) {
                Found::Text(text) => texts.push(text),
                Found::Stop(text, stop) => {
                    texts.push(text);
                    return (texts, Some(stop));
                }
            }
        }
        texts.push(matcher.finish());
        (texts, None)
    }

    #[test]
    fn a_stop_string_over_the_border_of_pieces_is_found_and_none_of_it_is_emitted() {
        let (texts, stop) = run(&["STOP"], false, &["a S", "T", "OPb", "c"]);
        assert_eq!(texts, ["a ", "", ""]);
        assert_eq!(stop.as_deref(), Some("STOP"));
    }

    #[test]
    fn what_only_began_like_a_stop_string_comes_later() {
        let (texts, stop) = run(&["STOP"], false, &["ST", "A", "ST"]);
        assert_eq!((texts.concat().as_str(), stop), ("STAST", None));
        assert_eq!(texts, ["", "STA", "", "ST"]);
    }

    #[test]
    fn a_stop_string_is_included_on_demand() {
        assert_eq!(run(&["b"], true, &["abc"]), (vec!["ab".to_owned()], Some("b".to_owned())));
    }

    #[test]
    fn of_stop_strings_that_end_together_the_longest_is_cut() {
        assert_eq!(run(&["c", "bc"], false, &["abcd"]), (vec!["a".to_owned()], Some("bc".to_owned())));
    }

    /// The text up to its first stop string, looked for character by character.
    fn reference(stops: &[String], text: &str) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let longest =
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).max_by_key(|s| s.len());
            if let Some(stop) = longest {
                return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            stops in prop::collection::vec("[abß]{1,4}", 0..4),
            pieces in prop::collection::vec("[abß]{0,5}", 0..12),
        ) {
            let stop_texts: Vec<&str> = stops.iter().map(String::as_str).collect();
            let piece_texts: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (texts, stop) = run(&stop_texts, false, &piece_texts);
            prop_assert_eq!((texts.concat(), stop), reference(&stops, &pieces.concat()));
        }
    }
}
