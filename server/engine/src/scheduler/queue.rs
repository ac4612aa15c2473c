//! The sequences that wait, and whose turn it is.
//!
//! Served next is a request of the lowest priority number; among these one of the tenant that has had the least
//! service; among these the one that arrived first. A tenant's service is counted in tokens over its weight: those
//! of a prompt once, those of a completion twice, because each takes a step. Whoever comes back from idleness
//! starts with the service of those who wait, so that nobody saves up service, nor pays for what nobody else
//! wanted. This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
//! tenants that always have requests waiting get service that differs by a constant, however long they wait.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::request::RequestId;
use crate::sequence::{Sequence, SequenceState};

/// What a token of a completion counts, in tokens of a prompt.
const COMPLETION_TOKEN: u64 = 2;
/// What a token counts for a tenant of weight 1: service is divided by weights in whole numbers.
const TOKEN: u64 = 1 << 20;

/// Requests of one tenant with one priority: in the order of arrival.
type Line = (i32, Arc<str>);

/// See the [module](self).
pub(super) struct Queue {
    /// None is empty.
    lines: BTreeMap<Line, VecDeque<Sequence>>,
    line_of: BTreeMap<RequestId, Line>,
    tenants: BTreeMap<Arc<str>, Tenant>,
    weights: BTreeMap<String, u32>,
    /// The service of the tenant served last.
    last_service: u64,
}

struct Tenant {
    weight: u64,
    service: u64,
    waiting: usize,
}

impl Queue {
    /// An empty queue; the weight of tenants not in `weights` is 1.
    pub(super) fn new(weights: &BTreeMap<String, u32>) -> Self {
        Self {
            lines: BTreeMap::new(),
            line_of: BTreeMap::new(),
            tenants: BTreeMap::new(),
            weights: weights.clone(),
            last_service: 0,
        }
    }

    /// Sequences in it.
    pub(super) fn len(&self) -> usize {
        self.line_of.len()
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.line_of.is_empty()
    }

    /// Adds a request that has just arrived.
    pub(super) fn push(&mut self, sequence: Sequence) {
        let waiting = self.tenants.values().filter(|tenant| tenant.waiting > 0);
        let least = waiting.map(|tenant| tenant.service).min().unwrap_or(self.last_service);
        let weight = self.weights.get(&*sequence.tenant).copied().unwrap_or(1).max(1);
        let new = || Tenant { weight: u64::from(weight), service: 0, waiting: 0 };
        let tenant = self.tenants.entry(Arc::clone(&sequence.tenant)).or_insert_with(new);
        if tenant.waiting == 0 {
            tenant.service = tenant.service.max(least);
        }
        self.insert(sequence, VecDeque::push_back);
    }

    /// Puts a sequence back that was taken out: it is older than those of its line.
    pub(super) fn put_back(&mut self, mut sequence: Sequence) {
        sequence.state = SequenceState::Waiting;
        self.insert(sequence, VecDeque::push_front);
    }

    fn insert(&mut self, sequence: Sequence, push: fn(&mut VecDeque<Sequence>, Sequence)) {
        let line = (sequence.priority, Arc::clone(&sequence.tenant));
        if let Some(tenant) = self.tenants.get_mut(&line.1) {
            tenant.waiting += 1;
        }
        self.line_of.insert(sequence.id, line.clone());
        push(self.lines.entry(line).or_default(), sequence);
    }

    /// The line whose turn it is.
    fn next_line(&self) -> Option<(&Line, &VecDeque<Sequence>)> {
        let (&(priority, _), _) = self.lines.first_key_value()?;
        let best = self.lines.iter().take_while(|((other, _), _)| *other == priority);
        best.min_by_key(|((_, tenant), line)| {
            let service = self.tenants.get(tenant).map_or(0, |tenant| tenant.service);
            (service, line.front().map(|sequence| sequence.id))
        })
    }

    /// The sequence whose turn it is.
    pub(super) fn front(&self) -> Option<&Sequence> {
        self.next_line().and_then(|(_, line)| line.front())
    }

    /// Takes that sequence out.
    pub(super) fn pop_front(&mut self) -> Option<Sequence> {
        let id = self.front()?.id;
        let sequence = self.remove(id)?;
        self.last_service = self.tenants.get(&sequence.tenant).map_or(0, |tenant| tenant.service);
        Some(sequence)
    }

    /// Takes a sequence out, wherever it stands.
    pub(super) fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        let line = self.line_of.remove(&id)?;
        let sequences = self.lines.get_mut(&line)?;
        let index = sequences.binary_search_by_key(&id, |sequence| sequence.id).ok()?;
        let sequence = sequences.remove(index);
        if sequences.is_empty() {
            self.lines.remove(&line);
        }
        if let Some(tenant) = self.tenants.get_mut(&line.1) {
            tenant.waiting -= 1;
        }
        sequence
    }

    /// Counts tokens of a prompt that are computed for `tenant`.
    pub(super) fn charge_prompt(&mut self, tenant: &Arc<str>, tokens: usize) {
        self.charge(tenant, tokens as u64);
    }

    /// Counts tokens that were generated for `tenant`.
    pub(super) fn charge_completion(&mut self, tenant: &Arc<str>, tokens: usize) {
        self.charge(tenant, COMPLETION_TOKEN * tokens as u64);
    }

    fn charge(&mut self, tenant: &Arc<str>, tokens: u64) {
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.service = tenant.service.saturating_add(tokens * TOKEN / tenant.weight);
        }
    }

    /// Every line in the order of priorities and tenants.
    #[cfg(test)]
    pub(super) fn lines(&self) -> impl Iterator<Item = impl Iterator<Item = &Sequence> + Clone> {
        self.lines.values().map(VecDeque::iter)
    }

    /// What a tenant has had, in tokens of a prompt over its weight.
    #[cfg(test)]
    pub(super) fn service(&self, tenant: &str) -> f64 {
        self.tenants.get(tenant).map_or(0.0, |tenant| tenant.service as f64 / TOKEN as f64)
    }
}
