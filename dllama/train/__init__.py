"""Training, with torch and transformers (extra ``train``); nothing here is imported by what runs models.

``embedded``, ``trainer`` and ``corpus`` made the model that the package ships. ``finetune`` trains an adapter for a
model that stays as it is: ``base_model`` brings the model, ``examples`` the data, ``adapters`` the modules.
"""
