//! Thoughts in texts, however they are cut, and constraints after thoughts.

use std::sync::Arc;

use nibble_engine::{ConstraintError, TokenConstraint, TokenMask};
use proptest::prelude::*;

use super::constraint::AfterThinking;
use super::{Reasoning, ReasoningDelta, ReasoningParser, Thinking};
use crate::grammar::tests::{ADDED, END, VOCABULARY, drafts_are_as_step_by_step, tokenizer_with};
use crate::testing::pieces;

fn parse(thinking: Thinking, pieces: &[&str]) -> (String, String) {
    let mut parser = ReasoningParser::new(thinking);
    let mut deltas: Vec<ReasoningDelta> = pieces.iter().map(|piece| parser.push(piece)).collect();
    deltas.push(parser.finish());
    let reasoning = deltas.iter().map(|delta| delta.reasoning.as_str()).collect();
    (reasoning, deltas.iter().map(|delta| delta.answer.as_str()).collect())
}

#[test]
fn thoughts_are_what_is_between_the_tags_without_the_white_space_around_it() {
    for (thinking, text, reasoning, answer) in [
        (Thinking::Possible, "<think>\nso  so\n</think>\n\nYes. ", "so  so", "Yes. "),
        (Thinking::Possible, "\n <think></think>Yes", "", "Yes"),
        (Thinking::Possible, "<think>\n\n</think>\n\nYes", "", "Yes"),
        (Thinking::Possible, " Yes <think>no</think>", "", " Yes <think>no</think>"),
        (Thinking::Possible, "<thin", "", "<thin"),
        (Thinking::Possible, "<think>cut", "cut", ""),
        (Thinking::Possible, "", "", ""),
        (Thinking::Begun, "\nso </thi </think> Yes", "so </thi", "Yes"),
        (Thinking::Begun, "so <</think>", "so <", ""),
        (Thinking::Begun, "so </", "so </", ""),
        (Thinking::Begun, "</think>Yes</think>", "", "Yes</think>"),
        (Thinking::Over, "\n\nYes <think>", "", "Yes <think>"),
    ] {
        assert_eq!(parse(thinking, &[text]), (reasoning.to_owned(), answer.to_owned()), "{text:?}");
    }
}

/// What the parser must find, from the whole text.
fn reference(thinking: Thinking, text: &str) -> (String, String) {
    let inside = match thinking {
        Thinking::Over => return (String::new(), text.trim_start().to_owned()),
        Thinking::Begun => text,
        Thinking::Possible => match text.trim_start().strip_prefix("<think>") {
            Some(inside) => inside,
            None => return (String::new(), text.to_owned()),
        },
    };
    match inside.split_once("</think>") {
        Some((reasoning, answer)) => (reasoning.trim().to_owned(), answer.trim_start().to_owned()),
        None => (inside.trim().to_owned(), String::new()),
    }
}

proptest! {
    #[test]
    fn the_result_does_not_depend_on_the_pieces(
        parts in prop::collection::vec(
            prop::sample::select(vec!["<think>", "</think>", "<", "</thi", "nk>", " ", "\n", "a", "ß🦀"]), 0..12),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        thinking in prop::sample::select(vec![Thinking::Begun, Thinking::Possible, Thinking::Over]),
    ) {
        let text = parts.concat();
        let pieces = pieces(&text, &cuts);
        prop_assert_eq!(parse(thinking, &pieces), reference(thinking, &text));
    }
}

/// Allows the token "7" after any completion that it has not seen the end of.
#[derive(Clone)]
struct Sevens;

impl TokenConstraint for Sevens {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        assert!(completion.iter().all(|&token| token == u32::from(b'7')), "the answer only: {completion:?}");
        let mut mask = TokenMask::default();
        mask.allow(u32::from(b'7'));
        Ok(mask)
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

const OPEN: u32 = ADDED;
const CLOSE: u32 = ADDED + 1;

fn constraint(added: &[&str], thinking: Thinking) -> AfterThinking {
    let tags = Reasoning::new(Arc::new(tokenizer_with(added)), VOCABULARY, vec![END]);
    AfterThinking::new(tags, thinking, Box::new(Sevens))
}

fn allowed(constraint: &mut dyn TokenConstraint, completion: &[u32]) -> Vec<u32> {
    let mask = constraint.allowed_after(completion).unwrap();
    (0..VOCABULARY as u32).filter(|&token| mask.allows(token)).collect()
}

#[test]
fn a_constraint_holds_from_the_end_of_the_thoughts() {
    let tags = ["<think>", "</think>"];
    let seven = u32::from(b'7');
    let mut possible = constraint(&tags, Thinking::Possible);
    assert_eq!(allowed(&mut possible, &[]), [seven, OPEN], "thoughts or an answer");
    let mut answers = possible.boxed_clone();
    assert_eq!(allowed(&mut *answers, &[seven, seven]), [seven], "no thoughts");
    let free = allowed(&mut possible, &[OPEN, 1, 2]);
    assert_eq!(free.len(), VOCABULARY - 1, "thoughts are free, but do not end the answer");
    assert!(!free.contains(&END));
    assert_eq!(allowed(&mut possible, &[OPEN, 1, 2, CLOSE, seven]), [seven]);
    let mut begun = constraint(&tags, Thinking::Begun);
    assert_eq!(allowed(&mut begun, &[seven, 1]).len(), VOCABULARY - 1);
    assert_eq!(allowed(&mut begun, &[seven, 1, CLOSE]), [seven]);
}

#[test]
fn what_may_come_along_a_draft_is_what_may_come_step_by_step() {
    let tags = ["<think>", "</think>"];
    for thinking in [Thinking::Possible, Thinking::Begun] {
        let constraint = constraint(&tags, thinking);
        let allowed_tokens: usize =
            (0..200).map(|seed| drafts_are_as_step_by_step(&constraint, seed, &[OPEN, CLOSE])).sum();
        assert!(allowed_tokens > 3000, "{allowed_tokens}");
        let seven = u32::from(b'7');
        let mut along = constraint.boxed_clone();
        let (before, draft) = match thinking {
            Thinking::Begun => (vec![1], vec![2, CLOSE, seven, seven, 2, 2]),
            _ => (vec![], vec![OPEN, CLOSE, seven, seven, 2, 2]),
        };
        let masks = along.allowed_along(&before, &draft);
        assert_eq!(masks.len(), 5, "up to what is no answer");
        assert!((2..5).all(|at| masks[at].as_ref().is_ok_and(|mask| mask.allows(seven) && !mask.allows(2))));
    }
}

#[test]
fn a_closing_tag_of_several_tokens_is_found() {
    let mut begun = constraint(&["think>7", "think>\n"], Thinking::Begun);
    let before = [b"aaaaaaaaaaaaaaa</".map(u32::from)].concat();
    assert_eq!(allowed(&mut begun, &before).len(), VOCABULARY - 1);
    let mut unclear = begun.boxed_clone();
    assert_eq!(allowed(&mut begun, &[&before[..], &[CLOSE]].concat()), [u32::from(b'7')]);
    let error = unclear.allowed_after(&[&before[..], &[OPEN]].concat()).unwrap_err();
    assert!(error.message.contains("</think>"), "{error}");
}

#[test]
fn a_prompt_says_whether_the_model_thinks() {
    let tags = Reasoning::new(Arc::new(tokenizer_with(&[])), VOCABULARY, vec![END]);
    for (prompt, thinking) in [
        ("<think>a</think>b<assistant><think>\n", Thinking::Begun),
        ("<think>a</think>b<assistant>", Thinking::Possible),
        ("<assistant><think>\n\n</think>\n\n", Thinking::Over),
    ] {
        assert_eq!(tags.after_prompt(prompt), thinking, "{prompt}");
    }
}
