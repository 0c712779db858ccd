//! Checks a plan against its contract before any of its indices is used.
//!
//! A wrong index must be an error that names itself, not a panic in a kernel (or a silent read of somebody else's
//! KV). Costs O(T + blocks of the rows) of cheap compares, against a pass of milliseconds.

use forebay_schedule::StepPlan;

/// Which promise of [`StepPlan`] a plan breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("`{field}` has {found} entries, {expected} expected")]
    Length { field: &'static str, found: usize, expected: usize },
    #[error("`{field}` is not an ascending sequence that ends at {end}")]
    Starts { field: &'static str, end: usize },
    #[error("row {row} has no tokens")]
    EmptyRow { row: usize },
    #[error("token id {token} in row {row}, the vocabulary has {vocab}")]
    Token { row: usize, token: u32, vocab: usize },
    #[error("position {position} in row {row} does not follow the one before")]
    Position { row: usize, position: u32 },
    #[error("position {position} in row {row}, the limit is {limit}")]
    TooLong { row: usize, position: u32, limit: usize },
    #[error("row {row} has {found} blocks, {needed} are needed")]
    Blocks { row: usize, found: usize, needed: usize },
    #[error("block {block} in row {row}, there are {blocks}")]
    Block { row: usize, block: u32, blocks: usize },
    #[error("logit token {token} at place {place} is not ascending or not below {tokens}")]
    LogitToken { place: usize, token: u32, tokens: usize },
}

/// What a plan's indices must stay below.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) vocab: usize,
    pub(super) block_size: usize,
    pub(super) blocks: usize,
    pub(super) positions_max: usize,
}

pub(super) fn check_plan(plan: &StepPlan, bounds: &Bounds) -> Result<(), PlanError> {
    let (rows, tokens) = (plan.rows(), plan.tokens());
    length("positions", plan.positions.len(), tokens)?;
    starts("row_starts", &plan.row_starts, rows, tokens)?;
    starts("table_starts", &plan.table_starts, rows, plan.block_tables.len())?;
    for row in 0..rows {
        let range = plan.row(row);
        if range.is_empty() {
            return Err(PlanError::EmptyRow { row });
        }
        if let Some(&token) = plan.token_ids[range.clone()].iter().find(|&&t| t as usize >= bounds.vocab) {
            return Err(PlanError::Token { row, token, vocab: bounds.vocab });
        }
        let positions = &plan.positions[range];
        if let Some(pair) = positions.windows(2).find(|pair| pair[0].checked_add(1) != Some(pair[1])) {
            return Err(PlanError::Position { row, position: pair[1] });
        }
        let position = positions[positions.len() - 1];
        if position as usize >= bounds.positions_max {
            return Err(PlanError::TooLong { row, position, limit: bounds.positions_max });
        }
        let table = plan.block_table(row);
        let needed = (position as usize + 1).div_ceil(bounds.block_size);
        if table.len() < needed {
            return Err(PlanError::Blocks { row, found: table.len(), needed });
        }
        if let Some(&block) = table.iter().find(|&&b| b as usize >= bounds.blocks) {
            return Err(PlanError::Block { row, block, blocks: bounds.blocks });
        }
    }
    let mut at_least = 0;
    for (place, &token) in plan.logit_tokens.iter().enumerate() {
        if token < at_least || token as usize >= tokens {
            return Err(PlanError::LogitToken { place, token, tokens });
        }
        at_least = token + 1;
    }
    Ok(())
}

fn length(field: &'static str, found: usize, expected: usize) -> Result<(), PlanError> {
    if found == expected { Ok(()) } else { Err(PlanError::Length { field, found, expected }) }
}

/// Prefix sums: `count + 1` ascending entries from 0 to `end`. An entirely empty plan may leave them out.
fn starts(field: &'static str, starts: &[u32], count: usize, end: usize) -> Result<(), PlanError> {
    if count == 0 && end == 0 && starts.is_empty() {
        return Ok(());
    }
    length(field, starts.len(), count + 1)?;
    let ascending = starts.is_sorted() && starts[0] == 0 && starts[count] as usize == end;
    if ascending { Ok(()) } else { Err(PlanError::Starts { field, end }) }
}

#[cfg(test)]
mod tests {
    use forebay_schedule::SeqId;

    use super::*;

    const BOUNDS: Bounds = Bounds { vocab: 10, block_size: 4, blocks: 8, positions_max: 16 };

    /// Two rows: three tokens of a prompt, then token 6 of a longer sequence.
    fn plan() -> StepPlan {
        StepPlan {
            seqs: vec![SeqId(1), SeqId(2)],
            token_ids: vec![1, 2, 3, 9],
            positions: vec![0, 1, 2, 5],
            row_starts: vec![0, 3, 4],
            block_tables: vec![7, 0, 1],
            table_starts: vec![0, 1, 3],
            logit_tokens: vec![2, 3],
        }
    }

    fn check(change: impl FnOnce(&mut StepPlan), expect: Result<(), PlanError>) {
        let mut plan = plan();
        change(&mut plan);
        assert_eq!(check_plan(&plan, &BOUNDS), expect);
    }

    #[test]
    fn a_good_plan_passes_and_each_broken_promise_is_named() {
        use PlanError::*;
        check(|_| {}, Ok(()));
        check(|p| *p = StepPlan::default(), Ok(()));
        check(|p| p.positions.truncate(3), Err(Length { field: "positions", found: 3, expected: 4 }));
        check(|p| p.row_starts = vec![0, 4], Err(Length { field: "row_starts", found: 2, expected: 3 }));
        check(|p| p.row_starts = vec![0, 3, 5], Err(Starts { field: "row_starts", end: 4 }));
        check(|p| p.row_starts = vec![0, 5, 4], Err(Starts { field: "row_starts", end: 4 }));
        check(|p| p.row_starts = vec![0, 0, 4], Err(EmptyRow { row: 0 }));
        check(|p| p.token_ids[3] = 10, Err(Token { row: 1, token: 10, vocab: 10 }));
        check(|p| p.positions[2] = 3, Err(Position { row: 0, position: 3 }));
        check(|p| p.positions[3] = 16, Err(TooLong { row: 1, position: 16, limit: 16 }));
        check(|p| p.positions[3] = 8, Err(Blocks { row: 1, found: 2, needed: 3 }));
        check(|p| p.block_tables[0] = 8, Err(Block { row: 0, block: 8, blocks: 8 }));
        check(|p| p.logit_tokens = vec![4], Err(LogitToken { place: 0, token: 4, tokens: 4 }));
        check(|p| p.logit_tokens = vec![2, 2], Err(LogitToken { place: 1, token: 2, tokens: 4 }));
    }
}
