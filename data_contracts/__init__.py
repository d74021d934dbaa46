"""Data contracts: what an episode, its steps and the offline buffer must be, in YAML that a data steward owns.

contracts/     the contracts themselves (Open Data Contract Standard v3); LWD_CONTRACTS names a folder of edited copies
contract.py    reads a contract and refuses typos
rules.py       which checks there are, their parameters, and the fields that each fits
checks.py      one episode against its contract in plain code, as it arrives
frames.py      many episodes as tables
suites.py      the same rules over those tables, or over the whole buffer, in Great Expectations
review.py      one offline HTML page for stewards: rules, results, quarantined episodes and why
"""
