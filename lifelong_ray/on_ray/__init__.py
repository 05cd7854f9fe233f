"""Everything that needs Ray; the only importer of it.

`serving` is the HTTP application, `rollout` the controller that moves versions,
`training` and `tuning` run the learning engine on workers, `schedule` starts jobs.
Deciding is done elsewhere: these modules carry decisions out.
"""
