"""`mmfuse compare`: one config under several fusion strategies and seeds, all else equal, in one table.

`command` reads the words and leads through the rest: `strategies` says what is compared and that nothing else differs,
`budget` how long each strategy trains, `runs` trains, `summary` turns runs into rows, and `report` shows them.
"""
